"""A connector in another process is not believed (DESIGN 3), and one client's stream is no other one's trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from services.router import module_loader, old_copies
from services.router.connector_link import ConnectorLink
from services.router.copies import Copies
from services.router.negotiation import Negotiation, Negotiator
from services.router.resumption import Resumption
from services.router.routing_fields import verified
from services.router.sessions import Session, when_all_have_it
from tests.unit.router.memory_router import HOST, MemoryRouter, iq, until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AttachRequest, AttachResponse, StreamEvent
from tidings.cluster.view import ClusterView
from tidings.kit import link as link_kit
from tidings.kit.db import DatabaseAway
from tidings.kit.link import Lane, Outbox
from tidings.kit.module import IQ, MESSAGE, NONZA
from tidings.xmpp.jid import Jid

JID = "romeo@example.org/orchard"
GOOD = (
    b"<message from='romeo@example.org/orchard' to='juliet@example.org' type='chat' id='1'><body>x</body></message>"
)


def test_routing_fields_come_from_the_bytes() -> None:
    envelope = Envelope(kind=IQ, type="lie", id="lie", to_jid="tybalt@example.org", children=["lie"], stanza=GOOD)
    assert verified(envelope, JID)
    assert (envelope.kind, envelope.type, envelope.id) == (MESSAGE, "chat", "1")
    assert (envelope.to_jid, list(envelope.children)) == ("juliet@example.org", ["body"])


@pytest.mark.parametrize(
    "raw",
    [
        GOOD.replace(b"romeo@", b"tybalt@"),
        GOOD.replace(b" from='romeo@example.org/orchard'", b""),
        GOOD + GOOD,
        GOOD + b"<",
        b"",
        b"<letter from='romeo@example.org/orchard'/>",
        GOOD.replace(b"<body>", b"<!-- x --><body>"),
        GOOD.replace(b"x</body>", b"\xff</body>"),
        b"</stream:stream>",
    ],
)
def test_what_is_not_one_stanza_of_the_session_is_refused(raw: bytes) -> None:
    assert not verified(Envelope(stanza=raw), JID)
    assert verified(Envelope(stanza=GOOD), JID), "the next one is not harmed"


def test_before_there_is_a_session_an_element_that_is_no_stanza_is_told_apart() -> None:
    envelope = Envelope(kind=IQ, stanza=b"<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl' type='get'/>")
    assert verified(envelope, None)
    assert envelope.kind == NONZA


# --- a link with streams ---


class NobodyElsewhere:
    """The rows of an account that has no sessions at other routers."""

    async def end_elsewhere(self, account: Jid) -> None:
        return


class NothingMoves:
    """A router that hands no session over."""

    async def settled(self, session: Session) -> None:
        return

    def is_settled(self, session: Session) -> bool:
        return True


class Attached:
    """A router, and one connector's link to it."""

    def __init__(self) -> None:
        self.router = MemoryRouter()
        nobody: Any = None
        router = self.router
        self.resumption = Resumption(
            router.own, router.sessions, router.stores.table, router.safety, router.acknowledgements,
            NothingMoves(), self._reachable, router.tasks.spawn,  # type: ignore[arg-type]
        )  # fmt: skip
        self.negotiator = Negotiator(
            router.own, router.routing, router.sessions, router.hooks, authentication=nobody,
            accounts=router.stores.accounts, binding=NobodyElsewhere(),  # type: ignore[arg-type]
            hand_over=nobody, adoption=nobody, tickets=nobody, safety=router.safety,
            acknowledgements=router.acknowledgements, resumption=self.resumption,
            copies=Copies(router.own, nobody, router.routing.deliveries.deadlines, ClusterView, router.tasks.spawn),
            answers=nobody, spawn=router.tasks.spawn,
        )  # fmt: skip
        self.outbox: Outbox[AttachResponse] = Outbox(AttachResponse, 0)
        self.cut_off = 0
        self.link = ConnectorLink(
            self.negotiator, self.outbox, "c1", "c1", True, self.router.tasks.spawn, self._cut_off
        )

    async def _reachable(self, _session: Session) -> bool:
        return True

    def _cut_off(self) -> None:
        self.cut_off += 1

    async def bound(self, local: str) -> tuple[Negotiation, Session]:
        session = await self.router.session(local)
        session.link = self.link
        stream = Negotiation(self.link, session.stream, Lane(self.router.tasks.spawn))
        stream.session = session
        self.link._streams[session.stream] = stream
        self.link.bound(session, b"")
        return stream, session

    def closes(self) -> list[tuple[int, str]]:
        """Which streams were closed, and why."""
        return [
            (command.stream, command.close.condition)
            for command in self.outbox.batch.commands
            if command.WhichOneof("command") == "close"
        ]

    def stanzas(self, session: Session) -> list[bytes]:
        return [envelope.stanza for envelope in self.outbox.batch.envelopes if envelope.target == session.id]

    def ahead(self, stream: Negotiation, kind: int, raw: str, to: str = "") -> None:
        """As of a stream without a session."""
        event = StreamEvent(stream=stream.number)
        event.stanza.kind = kind  # type: ignore[assignment]
        event.stanza.stanza = raw.encode()
        event.stanza.to_jid = to
        event.stanza.type = "get"
        event.stanza.id = "1"
        event.stanza.children.append("{x}q")
        self.link.receive(AttachRequest(events=[event]))


@pytest.mark.parametrize("kind", [IQ, NONZA])
async def test_what_a_connector_sends_as_if_there_were_no_session_yet_reaches_nobody(
    attached: Attached, kind: int
) -> None:
    """What a client sends ahead of the answer that binds it waits at the connector: it is numbered in its copy."""
    stream, _ = await attached.bound("romeo")
    _, juliet = await attached.bound("juliet")
    attached.ahead(stream, kind, "<iq type='get' id='1'><q xmlns='x'/></iq>", juliet.jid_text)
    assert attached.closes() == [(stream.number, "internal-server-error")]
    assert attached.stanzas(juliet) == []


async def test_an_exception_costs_one_stream_and_not_the_link(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, romeo = await attached.bound("romeo")
    _, juliet = await attached.bound("juliet")
    from_session = attached.router.routing.from_session

    def breaks(session: Session, envelope: Envelope) -> Any:
        if session is romeo:
            raise RuntimeError("not foreseen")
        return from_session(session, envelope)

    monkeypatch.setattr(attached.router.routing, "from_session", breaks)
    first, second = iq("get", "1", juliet.jid_text, "{x}q"), iq("get", "2", romeo.jid_text, "{x}q")
    first.origin, second.origin = romeo.id, juliet.id
    attached.link.receive(AttachRequest(envelopes=[first, second]))
    assert attached.closes() == [(romeo.stream, "internal-server-error")]
    assert len(attached.stanzas(romeo)) == 1, "what came behind it was worked off"


async def test_a_connector_that_does_not_read_is_cut_off_and_nobody_else_notices(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands come from tasks that belong to the process: an exception of theirs would end it."""
    monkeypatch.setattr(link_kit, "MAX_WAITING", 1)
    _, romeo = await attached.bound("romeo")
    for _ in range(3 * link_kit.MAX_ENVELOPES):
        attached.link.command(romeo.stream).set_reading.reading = True
    assert attached.cut_off > 0


async def test_a_session_is_known_to_be_closed_before_its_end_is_worked_off(attached: Attached) -> None:
    stream, romeo = await attached.bound("romeo")
    romeo.lane.hold(asyncio.sleep(0))
    closed = StreamEvent(stream=stream.number)
    closed.closed.clean = True
    attached.link.receive(AttachRequest(events=[closed]))
    assert romeo.closed
    assert not attached.router.for_modules.is_open(romeo)


async def test_a_session_that_goes_to_another_router_keeps_its_holder_until_that_one_is_told(
    attached: Attached,
) -> None:
    """Else the connector that holds its copy is never told to forget it."""
    _, session = await attached.bound("romeo")
    other: Any = object()
    for holder, left in ((other, other), (attached.link, None)):
        session.holder = holder
        attached.link.release(session)
        assert session.holder is left


async def test_when_a_link_ends_the_copies_at_its_other_end_are_older_ones(attached: Attached) -> None:
    """And all that waits for that connector to have something goes on: it must know."""
    attached.link.local = False
    _, session = await attached.bound("romeo")
    session.resume_seconds = 60
    found: list[object] = []
    attached.link.when_copied(lambda: found.append(session.old_copies))
    attached.link.closed()
    assert found == [{attached.link}]
    session.closed = True
    attached.resumption.stop()


def epochs_raised(attached: Attached) -> list[Session]:
    """The sessions whose epochs the router raises from now on, in order."""
    raised: list[Session] = []

    async def keep(session: Session) -> bool:
        raised.append(session)
        return True

    attached.negotiator.copies.old.keep = keep
    return raised


class OtherConnector:
    """A connector that may hold copies: it has at once what it is sent."""

    local, over = False, False
    incarnation = "another connector"
    handling: Any = object()

    def hold(self, session: Session) -> None:
        session.holder = self  # type: ignore[assignment]

    def when_copied(self, then: Callable[[], None]) -> None:
        then()

    def tell_progress(self) -> None: ...

    def forget(self, session: Session) -> None: ...


@pytest.mark.parametrize("put_out", [False, True])
async def test_a_router_whose_links_end_lets_copies_count_until_it_knows_that_it_was_not_put_out(
    attached: Attached, monkeypatch: pytest.MonkeyPatch, put_out: bool
) -> None:
    """Drills, seed 35: it raised the epoch of a session that its connector was just bringing to another router, and
    the session was lost."""
    monkeypatch.setattr(old_copies, "AGAIN", 0.0)
    raised = epochs_raised(attached)
    asked: list[bool] = []

    async def is_in() -> bool:
        asked.append(True)
        return not put_out

    attached.negotiator.copies.old.is_in = is_in

    attached.link.local = False
    _, held = await attached.bound("romeo")
    _, streaming = await attached.bound("juliet")
    for session in (held, streaming):
        session.resume_seconds = 60
        session.holder = attached.link
    attached.link.unbound(held)
    assert held.id in attached.link._held
    attached.link.closed()
    settled: list[bool] = []
    when_all_have_it(streaming, settled.append)
    assert settled == [False], "nobody has a copy that it would have to wait for"
    assert (asked, held.old_copies, streaming.old_copies) == ([], {attached.link}, {attached.link}), (
        "while nobody has a better one these may still count"
    )
    other: Any = OtherConnector()
    attached.negotiator.copies.links = lambda: [other]
    for session in (held, streaming):
        attached.negotiator.copies.cover(session)
        when_all_have_it(session, settled.append)
    assert settled == [False], "it waits"
    await until(lambda: len(asked) >= (10 if put_out else 1))
    if put_out:
        assert raised == []
    else:
        await until(lambda: settled == [False, True, True])
        assert set(raised) == {held, streaming}
        assert (held.old_copies, streaming.old_copies) == (set(), set())
    attached.resumption.stop()


async def test_when_the_streams_connector_ends_its_copy_counts_no_more_though_another_one_has_the_good_copy(
    attached: Attached,
) -> None:
    """Else what is stored nowhere would wait for its client to come back."""
    raised = epochs_raised(attached)

    attached.link.local = False
    _, session = await attached.bound("romeo")
    session.resume_seconds = 60
    session.holder = OtherConnector()  # type: ignore[assignment]
    attached.link.closed()
    await until(lambda: raised == [session])
    assert session.old_copies == set()
    attached.resumption.stop()


async def test_an_account_is_deleted_also_when_the_database_was_away(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that does it belongs to the process: an exception of its own would end it."""
    monkeypatch.setattr(module_loader, "RETRY", 0.01)
    router = attached.router
    away = [True, True]

    def account_deleted(_account: Jid) -> None:
        if away:
            away.pop()
            raise DatabaseAway("for this test")

    router.hooks.account_deleted.append(account_deleted)
    await router.stores.accounts.create(HOST, "romeo", {})
    negotiator: Any = attached.negotiator
    router.for_modules._negotiator = negotiator
    router.for_modules.delete_account(Jid("romeo", HOST, ""))
    await until(lambda: not len(router.tasks))
    assert not away
    assert not await router.stores.accounts.exists(HOST, "romeo")
