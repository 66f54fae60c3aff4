"""XEP-0313 and XEP-0359 by a raw client: what a play cannot say, for it takes ids out of what it gets."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from tidings.testing.client import RawClient, Tree, show
from tidings.testing.server import Installation
from tidings.xmpp import ns

RESULT = f"{{{ns.MAM}}}result"
STANZA_ID = f"{{{ns.STANZA_ID}}}stanza-id"
MESSAGES = 25


class Reader(RawClient):
    """A client that reads its archive."""

    @property
    def bare(self) -> str:
        return self.jid.partition("/")[0]

    async def page(self, wanted: str = "", form: str = "") -> tuple[list[Tree], Tree]:
        """The results of a query, and its <fin/>."""
        set_ = f"<set xmlns='{ns.RSM}'>{wanted}</set>"
        query_id = secrets.token_hex(4)
        await self.send(
            f"<iq type='set' id='{query_id}'><query xmlns='{ns.MAM}' queryid='{query_id}'>{form}{set_}</query></iq>"
        )
        results: list[Tree] = []
        while True:
            tree = await self.element()
            if tree.get("id") == query_id:
                assert tree.get("type") == "result", show(tree)
                return results, tree[0]
            if len(tree) and tree[0].tag == RESULT:
                assert tree[0].get("queryid") == query_id
                assert tree.get("from") == self.bare, "XEP-0313 8.2: who asks checks this"
                results.append(tree[0])

    async def message(self, id_: str) -> Tree:
        while True:
            tree = await self.element()
            if tree.tag == f"{{{ns.CLIENT}}}message" and tree.get("id") == id_:
                return tree


def ends(fin: Tree) -> tuple[bool, str, str]:
    first, last = (fin.findtext(f".//{{{ns.RSM}}}{name}", "") for name in ("first", "last"))
    return fin.get("complete") == "true", first, last


def stanza_of(result: Tree) -> Tree:
    found = result.find(f".//{{{ns.CLIENT}}}message")
    assert found is not None, show(result)
    return found


def ids_by(message: Tree) -> list[tuple[str | None, str | None]]:
    return [(child.get("by"), child.get("id")) for child in message.findall(STANZA_ID)]


async def entered(installation: Installation, account: str, number: int) -> Reader:
    addresses = installation.client_addresses
    client = Reader(addresses[number % len(addresses)], installation.port, "localhost")
    await client.log_in(account, "secret")
    await client.send("<presence/>")
    await client.ping()
    return client


@pytest.fixture
async def pair(installation: Installation) -> AsyncIterator[tuple[Reader, Reader]]:
    """Romeo and juliet, on two nodes where there are so many."""
    names = [f"{name}-{secrets.token_hex(4)}" for name in ("romeo", "juliet")]
    await installation.add_accounts(*(f"{name}@localhost" for name in names))
    clients = [await entered(installation, name, number) for number, name in enumerate(names)]
    yield clients[0], clients[1]
    for client in clients:
        await client.abort()


async def chatted(romeo: Reader, juliet: Reader) -> list[str]:
    """They write to each other; the ids that juliet's archive gave to what she got."""
    given = []
    for number in range(MESSAGES):
        await romeo.send(f"<message to='{juliet.bare}' type='chat' id='{number}'><body>{number}</body></message>")
        ((by, id_),) = ids_by(await juliet.message(str(number)))
        assert by == juliet.bare, "XEP-0313 3.5, and nothing by romeo's archive, which is not hers"
        assert id_
        given.append(id_)
    # Whoever gets an answer has had all before it stored.
    await romeo.ping()
    return given


@pytest.mark.parametrize("backwards", [False, True])
async def test_pages_of_both_archives_are_the_conversation(pair: tuple[Reader, Reader], backwards: bool) -> None:
    """XEP-0313 4.3, XEP-0059 2.2, 2.3, 2.5"""
    romeo, juliet = pair
    given = await chatted(romeo, juliet)
    for reader in pair:
        pages: list[list[Tree]] = []
        place = "<before/>" if backwards else ""
        complete = False
        while not complete:
            results, fin = await reader.page(f"<max>7</max>{place}")
            complete, first, last = ends(fin)
            assert (first, last) == (results[0].get("id"), results[-1].get("id"))
            pages.append(results)
            place = f"<before>{first}</before>" if backwards else f"<after>{last}</after>"
        found = [result for page in (reversed(pages) if backwards else pages) for result in page]
        assert [stanza_of(result).get("id") for result in found] == [str(number) for number in range(MESSAGES)]
        assert len(pages) == 4
        if reader is juliet:
            assert [result.get("id") for result in found] == given, "XEP-0313 3.5: the ids of the messages that came"


async def test_a_client_that_comes_again_gets_what_it_has_missed_behind_the_last_id_that_it_has(
    pair: tuple[Reader, Reader], installation: Installation
) -> None:
    """XEP-0313 4.3.2, 9"""
    romeo, juliet = pair
    given = await chatted(romeo, juliet)
    results, fin = await juliet.page(f"<after>{given[9]}</after>")
    assert [result.get("id") for result in results] == given[10:]
    assert ends(fin) == (True, given[10], given[-1])
    results, fin = await juliet.page(f"<after>{given[-1]}</after>")
    assert (results, ends(fin)) == ([], (True, "", ""))


@pytest.mark.parametrize("away", [False, True])
async def test_a_forged_id_is_removed_in_whatever_notation_and_others_stay(
    pair: tuple[Reader, Reader], installation: Installation, away: bool
) -> None:
    """XEP-0359 3, rules 2 and 3"""
    romeo, juliet = pair
    name = juliet.bare.partition("@")[0]
    if away:
        await juliet.close()
    forged = (
        f"<stanza-id xmlns='{ns.STANZA_ID}' by='{juliet.bare}' id='forged-1'/>"
        f"<x:stanza-id xmlns:x='{ns.STANZA_ID}' id='forged-2' by='{juliet.bare.upper()}'></x:stanza-id>"
        f"<y:stanza-id by='&#{ord(name[0])};{juliet.bare[1:]}' id='forged-3'/>"
        f"<stanza-id xmlns='{ns.STANZA_ID}' by='room@muc.example.org' id='other'/>"
    )
    await romeo.send(
        f"<message xmlns:y='{ns.STANZA_ID}' to='{juliet.bare}' type='chat' id='m'><body>x</body>{forged}</message>"
    )
    await romeo.ping()
    if away:
        juliet = await entered_again(installation, juliet, name)
    message = await juliet.message("m")
    ids = dict(ids_by(message))
    assert len(message.findall(STANZA_ID)) == 2
    assert ids["room@muc.example.org"] == "other"
    results, _fin = await juliet.page()
    assert [result.get("id") for result in results] == [ids[juliet.bare]]
    assert "forged" not in show(stanza_of(results[0]))
    assert "room@muc.example.org" in dict(ids_by(stanza_of(results[0])))
    await juliet.abort()


async def entered_again(installation: Installation, reader: Reader, name: str) -> Reader:
    """Another session, before which messages wait."""
    client = Reader(installation.address, installation.port, "localhost")
    await client.log_in(name, "secret")
    await client.send("<presence/>")
    assert client.bare == reader.bare
    return client


async def test_an_id_that_the_sender_puts_in_for_its_own_archive_is_in_neither(pair: tuple[Reader, Reader]) -> None:
    """XEP-0359 3, rule 2; XEP-0313 3.5"""
    romeo, juliet = pair
    forged = f"<stanza-id xmlns='{ns.STANZA_ID}' by='{romeo.bare}' id='forged'/>"
    await romeo.send(f"<message to='{juliet.bare}' type='chat' id='m'><body>x</body>{forged}</message>")
    assert [by for by, _ in ids_by(await juliet.message("m"))] == [juliet.bare]
    await romeo.ping()
    results, _fin = await romeo.page()
    assert "forged" not in show(stanza_of(results[0]))
