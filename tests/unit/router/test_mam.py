"""XEP-0313: an account reads its archive, page by page, and nobody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from lxml import etree

from services.router.messages import ArchiveQuery, Page
from services.router.modules import xep_0313_mam
from services.router.sessions import Session
from tests.unit.router.archive import JULIET, ROMEO, ArchiveRouter, condition, query
from tests.unit.router.memory_router import HOST
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, Stanza, Where
from tidings.xmpp import datetimes, ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid

RESULT = f"{{{ns.MAM}}}result"
FORWARDED = f"{{{ns.FORWARD}}}forwarded"
FIN = f"{{{ns.MAM}}}fin"
NURSE = f"nurse@{HOST}/kitchen"


@pytest.fixture
async def router() -> AsyncIterator[ArchiveRouter]:
    made = ArchiveRouter()
    yield made
    await made.stop()


@pytest.fixture
async def juliet(router: ArchiveRouter) -> Session:
    return await router.session("juliet", "balcony")


def numbers(got: list[etree._Element]) -> list[int]:
    """Which messages came as results."""
    return [int(message.find(f"{RESULT}/{FORWARDED}/{{*}}message").get("id")) for message in got[:-1]]  # type: ignore[union-attr, arg-type]


def fin(got: list[etree._Element]) -> tuple[bool, str, str]:
    """Of the answer: whether it is complete, the ids of the first and the last message."""
    answer = got[-1]
    assert answer.get("type") == "result", etree.tostring(answer)
    (end,) = answer
    assert end.tag == FIN
    (page,) = end
    assert page.tag == f"{{{ns.RSM}}}set"
    assert end.get("complete") in (None, "true")
    return end.get("complete") == "true", *(page.findtext(f"{{{ns.RSM}}}{name}", "") for name in ("first", "last"))


# --- results ---


async def test_an_account_gets_all_its_messages_in_order_and_then_the_answer(
    router: ArchiveRouter, juliet: Session
) -> None:
    """4, 4.2, 4.3.2"""
    ids = [await router.archived(number) for number in range(1, 5)]
    for to in ("", str(JULIET)):
        got = await router.ask(juliet, "set", query(), to)
        assert numbers(got) == [1, 2, 3, 4]
        assert [message[0].get("id") for message in got[:-1]] == ids
        assert fin(got) == (True, ids[0], ids[-1])


async def test_a_result_is_the_message_as_it_came_with_its_time(router: ArchiveRouter, juliet: Session) -> None:
    """4.2, XEP-0297 3, XEP-0203 4"""
    id_ = await router.archived(1, at=1278803305000)
    message, _answer = await router.ask(juliet, "set", query(attributes=' queryid="f\'27"'))
    assert (message.get("from"), message.get("to")) == (str(JULIET), str(juliet.jid))
    (result,) = message
    assert (result.tag, result.get("queryid"), result.get("id")) == (RESULT, "f'27", id_)
    ((delay, stanza),) = result
    assert (delay.tag, delay.get("stamp")) == (f"{{{ns.DELAY}}}delay", "2010-07-10T23:08:25.000Z")
    assert stanza.tag == "{jabber:client}message"
    assert dict(stanza.attrib) == {"from": ROMEO, "to": str(JULIET), "type": "chat", "id": "1"}
    assert stanza.findtext("{jabber:client}body") == "1"


async def test_a_query_without_an_id_has_results_without_one(router: ArchiveRouter, juliet: Session) -> None:
    """4.2"""
    await router.archived(1)
    message, _answer = await router.ask(juliet, "set", query())
    assert "queryid" not in message[0].attrib


async def test_an_empty_archive_is_complete_and_has_no_first_message(router: ArchiveRouter, juliet: Session) -> None:
    """4.1, XEP-0059 2.2"""
    assert fin(await router.ask(juliet, "set", query())) == (True, "", "")


async def test_what_was_never_archived_is_not_found(router: ArchiveRouter, juliet: Session) -> None:
    await router.archived(1, archived=False)
    await router.archived(2)
    assert numbers(await router.ask(juliet, "set", query())) == [2]


# --- filters ---


@pytest.mark.parametrize(
    ("with_", "found"),
    [
        (ROMEO, [1, 4]),
        (f"romeo@{HOST}", [1, 2, 4]),
        (f"Romeo@{HOST.upper()}", [1, 2, 4]),
        (NURSE, [3]),
        (f"romeo@{HOST}/nowhere", []),
        (f"juliet@{HOST}", [5]),
        ("", [1, 2, 3, 4, 5]),
    ],
)
async def test_messages_are_found_by_their_other_side(
    router: ArchiveRouter, juliet: Session, with_: str, found: list[int]
) -> None:
    """4.1.1: a bare JID finds every resource; one's own finds only what one sent to oneself."""
    peers = (ROMEO, f"romeo@{HOST}/garden", NURSE, ROMEO, str(JULIET))
    for number, peer in enumerate(peers, 1):
        await router.archived(number, peer)
    assert numbers(await router.ask(juliet, "set", query(("with", with_)))) == found


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (2000, None, [2, 3]),
        (None, 2000, [1, 2]),
        (2000, 2000, [2]),
        (1001, 1999, []),
        (3001, None, []),
    ],
)
async def test_messages_are_found_by_their_time_both_ends_included(
    router: ArchiveRouter, juliet: Session, start: int | None, end: int | None, found: list[int]
) -> None:
    """4.1.2"""
    for number in (1, 2, 3):
        await router.archived(number, at=number * 1000)
    limits = {"start": start, "end": end}
    fields = [(name, datetimes.to_text(value)) for name, value in limits.items() if value is not None]
    assert numbers(await router.ask(juliet, "set", query(*fields))) == found


async def test_a_time_finer_than_that_of_messages_does_not_let_in_others(
    router: ArchiveRouter, juliet: Session
) -> None:
    """4.1.2: only messages whose time is equal to or later than `start`, equal to or earlier than `end`."""
    await router.archived(1, at=1000)
    for field in (("start", "1970-01-01T00:00:01.0001Z"), ("end", "1970-01-01T00:00:00.9999Z")):
        assert numbers(await router.ask(juliet, "set", query(field))) == []
    for field in (("start", "1970-01-01T00:00:00.9999Z"), ("end", "1970-01-01T00:00:01.0001Z")):
        assert numbers(await router.ask(juliet, "set", query(field))) == [1]


async def test_filters_hold_together_and_on_every_page(router: ArchiveRouter, juliet: Session) -> None:
    """4.1, 4.3"""
    for number in range(1, 21):
        await router.archived(number, ROMEO if number % 2 else NURSE, at=number * 1000)
    fields = (("with", ROMEO), ("start", "1970-01-01T00:00:05Z"), ("end", "1970-01-01T00:00:15Z"))
    first = await router.ask(juliet, "set", query(*fields, page="<max>4</max>"))
    assert numbers(first) == [5, 7, 9, 11]
    complete, _first, last = fin(first)
    assert not complete
    rest = await router.ask(juliet, "set", query(*fields, page=f"<max>4</max><after>{last}</after>"))
    assert numbers(rest) == [13, 15]
    assert fin(rest)[0]


@pytest.mark.parametrize("name", ["before-id", "after-id", "ids", "include-groupchat", "{urn:example}text", "WITH"])
async def test_a_field_that_is_not_offered_is_not_implemented(
    router: ArchiveRouter, juliet: Session, name: str
) -> None:
    """4.1.5"""
    (answer,) = await router.ask(juliet, "set", query(("with", ROMEO), (name, "x")))
    assert condition(answer) == "cancel feature-not-implemented"


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        (query(("with", "@")), "modify not-acceptable"),
        (query(("start", "yesterday")), "modify not-acceptable"),
        (query(("end", "2010-06-07")), "modify not-acceptable"),
        (query(("with", ROMEO), form_type="urn:xmpp:mam:1"), "modify bad-request"),
        (query(("with", ROMEO), form_type=""), "modify bad-request"),
        (query(("with", ROMEO), ("with", ROMEO)), "modify bad-request"),
        (query(page="<max>many</max>"), "modify bad-request"),
        (query(attributes=f" queryid='{'x' * 1025}'"), "modify bad-request"),
        (query(attributes=" node='urn:example'"), "cancel feature-not-implemented"),
    ],
)
async def test_a_query_that_is_not_in_order_is_refused(
    router: ArchiveRouter, juliet: Session, payload: str, wanted: str
) -> None:
    """4.1, 6.1.3, XEP-0004 4"""
    await router.archived(1)
    (answer,) = await router.ask(juliet, "set", payload)
    assert condition(answer) == wanted


async def test_the_form_names_the_fields_and_wants_none(router: ArchiveRouter, juliet: Session) -> None:
    """4.1, 4.1.5"""
    (answer,) = await router.ask(juliet, "get", query())
    ((form,),) = answer
    assert (form.tag, form.get("type")) == (f"{{{ns.DATA_FORMS}}}x", "form")
    assert [(field.get("var"), field.get("type")) for field in form] == [
        ("FORM_TYPE", "hidden"),
        ("with", "jid-single"),
        ("start", "text-single"),
        ("end", "text-single"),
    ]
    assert form.findtext("{*}field/{*}value") == ns.MAM
    assert form.find(".//{*}required") is None


# --- pages ---


@pytest.mark.parametrize("most", [1, 2, 7, 19, 20, 21])
@pytest.mark.parametrize("asked", [None, 1, 3, 1_000_000])
@pytest.mark.parametrize("backwards", [False, True])
async def test_pages_one_after_the_other_are_the_whole_archive(most: int, asked: int | None, backwards: bool) -> None:
    """4.3.1, 4.3.2, 4.3.3; XEP-0059 2.2, 2.3, 2.5: nothing twice, nothing left out, each in order, the end is told."""
    router = ArchiveRouter(f"--max-archive-page={most}")
    juliet = await router.session("juliet")
    for number in range(1, 21):
        await router.archived(number)
    limit = min(most, asked or most)
    size = f"<max>{asked}</max>" if asked else ""
    pages: list[list[int]] = []
    place = "<before/>" if backwards else ""
    complete = False
    while not complete:
        got = await router.ask(juliet, "set", query(page=size + place))
        complete, first, last = fin(got)
        pages.append(numbers(got))
        assert 0 < len(pages[-1]) <= limit
        assert (first, last) == (got[0][0].get("id"), got[-2][0].get("id"))
        place = f"<before>{first}</before>" if backwards else f"<after>{last}</after>"
    assert [number for page in (reversed(pages) if backwards else pages) for number in page] == list(range(1, 21))
    assert len(pages) == -(-20 // limit)
    await router.stop()


async def test_the_page_behind_the_last_message_is_empty_and_complete(router: ArchiveRouter, juliet: Session) -> None:
    """XEP-0059 2.2"""
    last = [await router.archived(number) for number in (1, 2)][-1]
    assert fin(await router.ask(juliet, "set", query(page=f"<after>{last}</after>"))) == (True, "", "")
    assert fin(await router.ask(juliet, "set", query(page=f"<before>{last}</before>")))[0]


@pytest.mark.parametrize("name", ["after", "before"])
@pytest.mark.parametrize("id_", ["AAAAAAAAAAAAAAAAAAAAAA", "28482-98726-73623", "x" * 5000, "é"])
async def test_an_id_that_the_archive_has_not_given_is_not_found(
    router: ArchiveRouter, juliet: Session, name: str, id_: str
) -> None:
    """4.3.2, XEP-0059 2.4"""
    await router.archived(1)
    (answer,) = await router.ask(juliet, "set", query(page=f"<{name}>{id_}</{name}>"))
    assert condition(answer) == "cancel item-not-found"


async def test_a_page_by_its_place_is_not_implemented(router: ArchiveRouter, juliet: Session) -> None:
    """XEP-0059 2.6"""
    (answer,) = await router.ask(juliet, "set", query(page="<max>10</max><index>0</index>"))
    assert condition(answer) == "cancel feature-not-implemented"


async def test_who_asks_for_no_messages_gets_none_and_is_told_whether_there_are_any(
    router: ArchiveRouter, juliet: Session
) -> None:
    """XEP-0059 2.7; 4.3.2: only what was not limited is complete."""
    assert fin(await router.ask(juliet, "set", query(page="<max>0</max>"))) == (True, "", "")
    await router.archived(1)
    assert fin(await router.ask(juliet, "set", query(page="<max>0</max>"))) == (False, "", "")


@pytest.mark.parametrize("backwards", [False, True])
async def test_a_page_of_big_messages_ends_before_it_overflows_the_client(
    router: ArchiveRouter, juliet: Session, backwards: bool
) -> None:
    """4.3.1"""
    for number, size in enumerate((400_000, 400_000, 400_000, 2_000_000, 10), 1):
        await router.archived(number, body="x" * size)
    pages = []
    place = "<before/>" if backwards else "<max>50</max>"
    complete = False
    while not complete:
        got = await router.ask(juliet, "set", query(page=place))
        complete, first, last = fin(got)
        pages.append(numbers(got))
        place = f"<before>{first}</before>" if backwards else f"<after>{last}</after>"
    assert pages == ([[5], [4], [2, 3], [1]] if backwards else [[1, 2], [3], [4], [5]])


async def test_without_a_limit_by_option_the_client_says_how_many() -> None:
    router = ArchiveRouter("--max-archive-page=0")
    juliet = await router.session("juliet")
    for number in range(1, 201):
        await router.archived(number)
    assert len(numbers(await router.ask(juliet, "set", query()))) == 200
    assert len(numbers(await router.ask(juliet, "set", query(page="<max>150</max>")))) == 150
    await router.stop()


# --- who may ---


@pytest.mark.parametrize("type_", ["get", "set"])
@pytest.mark.parametrize("to", [str(JULIET), f"nobody@{HOST}"])
async def test_somebody_elses_archive_is_forbidden(
    router: ArchiveRouter, juliet: Session, type_: str, to: str
) -> None:
    """8.1; and nobody learns whether there is one."""
    await router.archived(1)
    romeo = await router.session("romeo")
    (answer,) = await router.ask(romeo, type_, query(), to)
    assert condition(answer) == "auth forbidden"
    assert not router.link.of(juliet)


async def test_a_request_from_elsewhere_is_forbidden_whatever_it_says_of_its_sender(
    router: ArchiveRouter, juliet: Session
) -> None:
    """8.1: what comes from another router, a component or a module is of no session here."""
    handler = router.hooks.iq[Where.ACCOUNT, "set", xep_0313_mam.QUERY]
    raw = f"<iq type='set' id='q'>{query()}</iq>".encode()
    iq = Stanza(Envelope(kind=IQ, type="set", id="q", from_jid=str(juliet.jid), to_jid=str(JULIET), stanza=raw))
    answer: Any = handler(iq)
    with pytest.raises(StanzaError) as refused:
        await answer
    assert refused.value.condition == "forbidden"


async def test_an_archive_is_announced_where_it_is(router: ArchiveRouter) -> None:
    """7, XEP-0359 5, XEP-0059 4; the extended features are none of ours yet."""
    assert sorted(router.hooks.account_features) == sorted((ns.MAM, ns.RSM, ns.STANZA_ID))
    assert router.hooks.server_features == [ns.STANZA_ID]


# --- what can go wrong ---


async def test_while_the_database_is_away_the_client_is_told_to_wait(router: ArchiveRouter, juliet: Session) -> None:
    await router.archived(1)
    router.archive.away = True
    (answer,) = await router.ask(juliet, "set", query())
    assert condition(answer) == "wait resource-constraint"


async def test_a_session_that_goes_elsewhere_meanwhile_is_not_told_of_results_that_it_did_not_get(
    router: ArchiveRouter, juliet: Session
) -> None:
    """4: the answer says that all results were sent."""
    page = router.archive.page

    async def goes(account: Jid, wanted: ArchiveQuery) -> Page:
        found = await page(account, wanted)
        router.sessions.remove(juliet)
        return found

    await router.archived(1)
    router.archive.page = goes  # type: ignore[method-assign]
    (handler,) = [router.hooks.iq[Where.ACCOUNT, "set", xep_0313_mam.QUERY]]
    raw = f"<iq type='set' id='q'>{query()}</iq>".encode()
    answer: Any = handler(Stanza(Envelope(kind=IQ, type="set", id="q", from_jid=str(juliet.jid), stanza=raw), juliet))
    with pytest.raises(StanzaError) as refused:
        await answer
    assert refused.value.condition == "recipient-unavailable"
    assert not router.link.of(juliet)
