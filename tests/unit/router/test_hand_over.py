"""Sessions go from router to router (services/router/hand_over.py, adoption.py): what must hold, step by step."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.router import deliveries
from services.router.adoption import in_order, tell
from services.router.hand_over import HandOver
from services.router.sessions import Session, Sessions
from tests.unit.router.nodes import DRAINING, HOST, UP, Client, at_home, running, soon
from tests.unit.router.unsure_database import at_once, away
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, MESSAGE, PRESENCE
from tidings.xmpp.jid import Jid

# Messages of each sender before its last ones: three may send as many to one who confirms nothing, and may get a
# thousand before what comes then has to be read back (deliveries.WINDOW).
MOST = 300


class Talk:
    """Senders that write numbers to one receiver without waiting for it, to its full and its bare JID in turn."""

    def __init__(self, receiver: Client, *senders: Client) -> None:
        self._receiver = receiver
        self._senders = senders
        self._to = (f"{receiver.name}@{HOST}/r", f"{receiver.name}@{HOST}")
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.sent = 0
        self._most = MOST

    async def begin(self) -> None:
        self._task = asyncio.create_task(self._run())
        await soon(lambda: self.sent > 10, "the talk has begun")

    async def _run(self) -> None:
        while not self._over.is_set():
            if self.sent < self._most:
                self.sent += 1
                for index, sender in enumerate(self._senders):
                    sender.say(self._to[self.sent // 3 % 2], index * 100_000 + self.sent)
            await asyncio.sleep(0.002)

    async def end(self) -> None:
        """Goes on for a while; then every number has come once, and each sender's in order."""
        assert self._task is not None
        more = self._most = self.sent + 10
        await soon(lambda: self.sent >= more, "the talk goes on")
        self._over.set()
        await self._task
        expected = [[of * 100_000 + n for n in range(1, self.sent + 1)] for of in range(len(self._senders))]
        written = self._receiver
        await soon(lambda: len(written.numbers()) >= sum(map(len, expected)), f"all of {self.sent} messages came")
        for index, numbers in enumerate(expected):
            assert [number for number in written.numbers() if number // 100_000 == index] == numbers


async def test_no_message_of_a_stream_is_lost_or_overtaken_when_a_router_joins(tmp_path: Path) -> None:
    """Between the adoption and its answer what the sender writes reaches the new router, and before that the old."""
    async with running(tmp_path, "a", "b", "c") as nodes:
        nodes.latency = 0.03
        await nodes.up("a", "c")
        juliet = await nodes.client(at_home("juliet", ac="a", abc="b"))
        senders = [await nodes.client(at_home("s", ac=home, abc=home)) for home in "ac"]
        talk = Talk(juliet, *senders)
        await talk.begin()
        await nodes.up("a", "b", "c")
        await nodes.is_at("b", juliet.name)
        await talk.end()


@pytest.mark.parametrize("strategy", ["home", "online-users", "broadcast"])
async def test_no_message_of_a_stream_is_lost_or_overtaken_when_a_router_drains(
    tmp_path: Path, strategy: str
) -> None:
    async with running(tmp_path, "a", "b", "c", strategy=strategy) as nodes:
        nodes.latency = 0.03
        await nodes.up("a", "b", "c")
        juliet = await nodes.client(at_home("juliet", abc="a", bc="b"), at="a")
        senders = [
            await nodes.client(at_home("s", abc=home, bc=after), at=home) for home, after in ("ac", "bb", "cc")
        ]
        talk = Talk(juliet, *senders)
        await talk.begin()
        nodes.tell(a=DRAINING, b=UP, c=UP)
        await nodes.routers["a"].drain()
        await nodes.is_at("b", juliet.name)
        await talk.end()
        assert len(nodes.routers["a"].sessions) == 0


async def test_what_belongs_to_a_session_goes_with_it(tmp_path: Path) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        romeo = await nodes.client(at_home("romeo", ab="a"))
        juliet.send(
            "<presence><priority>5</priority></presence><iq type='get' id='r'><query xmlns='jabber:iq:roster'/></iq>"
        )
        juliet.send(f"<presence to='{romeo.name}@{HOST}/r'/>")
        await soon(lambda: juliet.name in romeo.written, "directed presence")
        before = nodes.session("a", juliet.name)
        assert before is not None
        before.notes["urn:example"] = b"value"
        nodes.tell(a=UP, b=UP)
        await nodes.is_at("b", juliet.name)
        after = nodes.session("b", juliet.name)
        assert after is not None
        for name in ("id", "jid", "lang", "taken", "directed", "interested", "priority", "notes"):
            assert getattr(after, name) == getattr(before, name), name
        assert after.inbound.number == before.inbound.number
        assert after.outbound.sent == before.outbound.sent
        assert after.epoch == before.epoch + 1
        assert after.interested
        assert "unavailable" not in romeo.written, "nobody sees presence"


async def test_what_was_confirmed_is_not_given_again_where_the_session_goes_before_that_is_written(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        romeo = await nodes.client(at_home("romeo", ab="a"))
        juliet.send("<enable xmlns='urn:xmpp:sm:3'/>")
        await juliet.until("<enabled")
        for number in (1, 2):
            romeo.say(f"{juliet.name}@{HOST}/r", number)
        await juliet.until("<body>2</body>")
        await nodes.waiting(juliet.name, 2)
        nodes.databases["a"].before = away
        juliet.send("<a xmlns='urn:xmpp:sm:3' h='2'/>")
        nodes.tell(a=UP, b=UP)
        await nodes.is_at("b", juliet.name)
        session = nodes.session("b", juliet.name)
        assert session is not None
        # What is stored for her is read there.
        await tell(nodes.routers["b"]._reattachment._hooks.session_available, session)
        romeo.say(f"{juliet.name}@{HOST}/r", 3)
        await juliet.until("<body>3</body>")
        assert juliet.numbers() == [1, 2, 3]
        nodes.databases["a"].before = at_once
        await nodes.waiting(juliet.name, 1)


async def test_an_answer_that_comes_late_answers_no_later_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connector that was silent answers all at once; only behind the last answer it sends nothing more."""
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        session = nodes.session("a", juliet.name)
        assert session is not None
        nodes.streams.remove(juliet.stream, "it does not answer")
        hand_over = nodes.routers["a"]._hand_over
        nodes.tell(a=UP, b=UP)
        await soon(lambda: session.id in hand_over._asked, "the connector is asked")
        question, answered = hand_over._asked[session.id]
        hand_over.ready(session, question - 1)
        assert not answered.done()
        hand_over.ready(session, question)
        assert answered.done()
        await soon(lambda: nodes.session("b", juliet.name) is not None, "and so it goes")


# --- what came by two ways ---


def stanza(number: int, origin: str = "s", raw: bytes = b"", kind: int = MESSAGE) -> Envelope:
    return Envelope(kind=kind, origin=origin if number else "", number=number, stanza=raw)  # type: ignore[arg-type]


def test_of_two_ways_each_stanza_comes_once_and_each_sender_in_order() -> None:
    given = [stanza(3), stanza(1, "t"), stanza(4)]
    early = [stanza(1), stanza(4), stanza(2, "t"), stanza(5)]
    found = list(in_order(given, early))
    assert [envelope.number for envelope in found if envelope.origin == "s"] == [1, 3, 4, 5]
    assert [envelope.number for envelope in found if envelope.origin == "t"] == [1, 2]


def test_what_has_no_number_is_known_by_its_bytes_but_for_presence() -> None:
    """The last presence counts, so one that is sent again is no double."""
    given = [stanza(0, raw=b"<message/>"), stanza(0, raw=b"<presence/>", kind=PRESENCE)]
    early = [stanza(0, raw=b"<presence type='unavailable'/>", kind=PRESENCE), *given, stanza(0, raw=b"<message/>")]
    found = [envelope.stanza for envelope in in_order(given, early)]
    assert found == [
        b"<message/>", b"<presence/>", b"<presence type='unavailable'/>", b"<presence/>", b"<message/>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "early", "found"),
    [
        ("AU", "U", "AU"),
        ("AU", "AU", "AU"),
        ("A", "UA", "AUA"),
        ("AUA", "UAU", "AUAU"),
        ("U", "AU", "UAU"),
        ("", "U", "U"),
        ("A", "A", "A"),
    ],
)
def test_presence_that_came_by_both_ways_comes_once(given: str, early: str, found: str) -> None:
    """RFC 6121 4.5.2: who saw a contact go is told so once."""

    def shown(letters: str) -> list[Envelope]:
        return [stanza(0, raw=letter.encode(), kind=PRESENCE) for letter in letters]

    assert "".join(one.stanza.decode() for one in in_order(shown(given), shown(early))) == found


def test_presence_of_one_sender_is_not_taken_for_that_of_another() -> None:
    first, second = (stanza(0, raw=b"<presence/>", kind=PRESENCE) for _ in range(2))
    first.from_jid, second.from_jid = "romeo@example.org/r", "nurse@example.org/r"
    assert list(in_order([first], [second])) == [first, second]


def test_an_answer_that_waited_for_a_session_that_has_ended_is_for_nobody() -> None:
    """A new session of its name would get an answer that it did not ask for."""
    routed: list[tuple[int, str]] = []
    routing: Any = SimpleNamespace(route=lambda envelope: routed.append((envelope.kind, envelope.type)))
    nothing: Any = None
    hand_over = HandOver("r", Sessions(), nothing, routing, nothing, nothing, nothing)
    session = Session(Jid("romeo", "example.org", "r"), "en", None, 1, nothing)
    kept = [
        Envelope(kind=kind, type=type_, from_jid="juliet@example.org/r", to_jid=session.jid_text)
        for kind, type_ in ((MESSAGE, "chat"), (IQ, "result"), (IQ, "error"), (IQ, "get"), (IQ, "set"))
    ]
    hand_over.send_on(session, kept)
    assert routed == [(MESSAGE, "chat"), (IQ, "get"), (IQ, "set")]


async def test_a_client_without_0198_that_is_behind_is_asked_again_where_its_session_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it answers to its former router's ping says nothing there, and it gets nothing of which it would be asked
    anew: it got none of the messages that waited for it."""
    monkeypatch.setattr(deliveries, "WINDOW", 10)
    async with running(tmp_path, "a", "b") as nodes:
        await nodes.up("a")
        juliet = await nodes.client(at_home("juliet", ab="b"))
        romeo = await nodes.client(at_home("romeo", ab="a"))
        answered: set[str] = set()

        def answers(wanted: int) -> bool:
            for id_ in set(re.findall(r"<iq type='get' id='(p[^']+)'", juliet.written)) - answered:
                answered.add(id_)
                juliet.send(f"<iq type='result' id='{id_}' to='{HOST}'/>")
            return juliet.numbers() == list(range(1, wanted + 1))

        romeo.say(f"{juliet.name}@{HOST}/r", 1)
        await soon(lambda: answers(1) and bool(answered), "the first message came and was confirmed")
        for number in range(2, 32):
            romeo.say(f"{juliet.name}@{HOST}/r", number)
        await romeo.answered()
        before = nodes.session("a", juliet.name)
        assert before is not None
        assert before.behind is not None
        nodes.tell(a=UP, b=UP)
        await nodes.is_at("b", juliet.name)
        await soon(lambda: answers(31), f"all came; what did: {juliet.numbers()}")
