"""A connector's copy of a session, and the router that carries the session on from it: what the client has sent keeps
its numbers, whatever of it the dead router had dealt with."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.connector.session_copy import Sent as Copied
from services.connector.session_copy import SessionCopy
from services.router import copies
from services.router.messages_memory import MemoryMessageStore
from services.router.session_record import record_of, session_of, state_of
from services.router.sessions import Session
from services.router.store_memory import MemorySessionTable
from tidings.api.common.v1.session_pb2 import SessionRecord
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import SessionProgress
from tidings.kit.module import MESSAGE
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream_management import Sent

JID = Jid.parse("romeo@example.org/r")


def nothing(_work: Any, _name: str) -> None: ...


class Pair:
    """A session at its router, and its copy; what is sent goes to both, the copy first."""

    def __init__(self) -> None:
        self.session = Session(JID, "en", None, 1, nothing)
        self.copy = SessionCopy("r1")
        self.copy.begin(record_of(self.session, ()), b"")
        # By position: the number that the router gave, and the text.
        self.given: list[tuple[int, str]] = []
        self.repeat: list[str] = []
        self.text = 0
        # The numbers of those on the present stream that have come back as errors, before they were safe.
        self.came_back: set[int] = set()

    def send(self, text: str = "") -> None:
        """A new stanza, or one that is repeated."""
        if not text:
            self.text += 1
            text = str(self.text)
        raw = f"<message id='{text}'><body>{text}</body></message>".encode()
        self.copy.sent(Copied(MESSAGE, "chat", text, "", ("body",), raw))
        self.given.append((accept(self.session, text, raw), text))

    def enable(self) -> None:
        if not self.session.inbound.counts:
            self.session.inbound.enable()
            self.copy.state(state_of(self.session))

    def settle(self, index: int) -> None:
        unsafe = self.session.inbound.unsafe()
        if unsafe:
            self.session.inbound.settle(unsafe[index % len(unsafe)])

    def comes_back(self, index: int) -> None:
        """The client gets an error for one of its messages; the copy has it first."""
        inbound, outbound = self.session.inbound, self.session.outbound
        unsafe = [number for number in inbound.unsafe() if inbound.place(number)]
        if unsafe:
            number = unsafe[index % len(unsafe)]
            outbound.sent += 1
            error = Envelope(kind=MESSAGE, type="error", delivery=outbound.sent, answers=inbound.place(number))
            inbound.answered(number)
            self.copy.delivered(error, b"<message type='error'/>")
            self.came_back.add(number)

    def progress(self) -> None:
        inbound = self.session.inbound
        self.copy.progress(
            SessionProgress(
                passed=inbound.passed, number=inbound.last_passed, again_from=inbound.again_from,
                confirmed=self.session.marked,
            )
        )  # fmt: skip

    def hold(self) -> None:
        """Another connector gets the copy, in the midst of the stream."""
        inbound = self.session.inbound
        if inbound.counts and inbound.passed >= inbound.before:
            self.copy = SessionCopy("r1")
            self.copy.begin(record_of(self.session, ()), b"")
            for sent in inbound.under_way():
                answered = sent.number in self.came_back
                assert inbound.is_done(sent.number) or not answered
                self.copy.sent(Copied(sent.kind, "chat", sent.id, sent.to, ("body",), sent.raw, answered))

    def resume(self) -> None:
        """The stream breaks and another one goes on; the client will repeat what is not in `h`."""
        inbound = self.session.inbound
        if inbound.counts:
            self.repeat = [sent.id for sent in inbound.kept()]
            self.came_back.clear()
            inbound.resume()
            self.copy = SessionCopy("r1")
            self.copy.begin(record_of(self.session, ()), b"")
            self.given.clear()

    def taken_over(self) -> tuple[Session, list[tuple[int, str]]]:
        """The session at another router, and the numbers that it gives to what the copy had kept."""
        record = SessionRecord()
        self.copy._whole(record)
        session = session_of(record, 1, nothing, doubtful=True)
        return session, [(accept(session, sent.id, sent.raw), sent.id) for sent in self.copy._sent]


def accept(session: Session, text: str, raw: bytes) -> int:
    """As Safety does it."""
    inbound = session.inbound
    if inbound.counts and inbound.may_repeat and (known := inbound.repeated(MESSAGE, text, "", raw)):
        return known
    number = inbound.take()
    if inbound.counts:
        inbound.count(Sent(number, MESSAGE, text, "", raw))
    return number


STEPS = st.lists(
    st.one_of(
        st.just("send"), st.just("send"), st.just("enable"), st.just("progress"), st.just("resume"), st.just("again"),
        st.just("hold"), st.just("skip"), st.integers(0, 5), st.integers(-6, -1),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@example(["send", "enable", "send", 1, "progress"])
@example(["send", "send", "enable", "send", "resume", "again", 2, "progress"])
@given(STEPS)
def test_the_router_that_takes_over_gives_the_same_numbers(steps: list[Any]) -> None:
    pair = Pair()
    told = 0
    for step in steps:
        if isinstance(step, int):
            if step < 0:
                pair.comes_back(-step)
            else:
                pair.settle(step)
        elif step in ("again", "skip"):
            # A client repeats what it likes of what it may, in order.
            if pair.repeat and (text := pair.repeat.pop(0)) and step == "again":
                pair.send(text)
        else:
            getattr(pair, step)()
        if step == "progress":
            told = pair.session.inbound.handled
    session, numbers = pair.taken_over()
    kept = len(numbers)
    assert numbers == pair.given[len(pair.given) - kept :], "each keeps its number"
    answered = {number for sent, (number, _) in zip(pair.copy._sent, numbers, strict=True) if sent.answered}
    assert answered == pair.came_back & {number for number, _ in numbers}, "what has come back is known, and no other"
    assert session.inbound.handled >= told, "what was told to be handled stays it"
    inbound = pair.session.inbound
    assert session.inbound.handled <= inbound.handled + sum(map(inbound.is_done, inbound.unsafe())), (
        "nothing is taken for safe that is not known to be, or has its answer in the copy too"
    )
    # And what comes next is above all.
    fresh = accept(session, "new", b"<message id='new'/>")
    assert fresh > max((number for number, _ in pair.given), default=0)


def test_what_the_client_has_not_confirmed_is_in_the_copy_until_that_is_written() -> None:
    pair = Pair()
    pair.enable()
    for delivery in (1, 2, 3):
        raw = b"<message from='juliet@example.org/j'/>"
        pair.copy.delivered(Envelope(delivery=delivery, origin="j", number=delivery + 10, kind=MESSAGE), raw)
    pair.session.marked = 2
    pair.progress()
    session, _ = pair.taken_over()
    assert [number for number, _ in session.outbound.queue] == [3]
    assert (session.outbound.sent, session.outbound.acknowledged) == (3, 2)
    assert (session.taken, session.since) == ({"j": 13}, {"j": 11})


class Store(MemoryMessageStore):
    """One whose marks may find no message."""

    unmatched: set[bytes] = set()  # type: ignore[assignment]  # noqa: RUF012 - replaced, never changed


class Receiver(Pair):
    """A session that gets messages, named by their deliveries; its holder is told at once what is written."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self._counts = counts
        if counts:
            self.enable()
        nothing_of_these: Any = None
        self._copies = copies.Copies("r1", nothing_of_these, nothing_of_these, nothing_of_these, nothing)
        # What the store was told that it is confirmed, and what of that is written.
        self._told: set[int] = set()
        self.written: set[int] = set()
        self.store = Store(MemorySessionTable())
        self._marks = self._copies.tell_marked(self.store)
        self._marks.send(None)
        self._is_held()

    def _is_held(self) -> None:
        holder: Any = self
        self.session.holder = holder

    def progress(self, _session: Session | None = None) -> None:
        super().progress()

    def deliver(self) -> None:
        outbound = self.session.outbound
        outbound.sent += 1
        envelope = Envelope(kind=MESSAGE, origin="j", number=outbound.sent, delivery=outbound.sent)
        outbound.keep(envelope if self._counts else b"%d" % outbound.sent)
        self.copy.delivered(envelope, b"<message/>")

    def confirm(self) -> None:
        """The client has half of what it has not confirmed."""
        outbound = self.session.outbound
        self._confirmed(outbound.confirm(outbound.acknowledged + (outbound.sent - outbound.acknowledged + 1) // 2))

    def _confirmed(self, what: Iterable[Envelope | bytes]) -> None:
        """As Safety does it."""
        found = names(what)
        self._told |= found
        self._copies.confirmed(self.session, [b"%d" % name for name in sorted(found)])

    def write(self) -> None:
        self.written |= self._told
        # Nothing waits in the store, so all that it waits for is its turn.
        self._marks.send(None)

    def begin(self) -> None:
        """Another connector gets the copy."""
        self.copy = SessionCopy("r1")
        self.copy.begin(record_of(self.session, ()), b"")

    def die(self) -> None:
        """The router: another one goes on from the copy."""
        self.session, _ = self.taken_over()
        outbound = self.session.outbound
        if not self._counts:
            outbound.queue = deque((number, b"%d" % number) for number, _ in outbound.queue)
        self._told &= self.written
        self._confirmed(id_ for _, id_ in self.session.unmarked)
        self._is_held()
        self.copy.attached(b"", "r1")


def names(what: Iterable[Envelope | bytes]) -> set[int]:
    return {int(one) if isinstance(one, bytes) else one.number for one in what}


def after(counts: bool, steps: list[str]) -> Receiver:
    receiver = Receiver(counts)
    for step in steps:
        getattr(receiver, step)()
    return receiver


RECEIVED = st.lists(st.sampled_from(["deliver", "deliver", "confirm", "write", "begin", "die"]), max_size=30)


@pytest.mark.parametrize("counts", [True, False], ids=["0198", "plain"])
@settings(max_examples=500, deadline=None)
@example(["deliver", "confirm", "begin"])
@given(steps=RECEIVED)
def test_no_router_forgets_what_was_confirmed_before_that_is_written(counts: bool, steps: list[str]) -> None:
    """It would give it again. And it takes nothing for confirmed that is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "MARKED", 0)
        receiver = after(counts, steps)
    unconfirmed = names(what for _, what in receiver.session.outbound.queue)
    delivered = set(range(1, receiver.session.outbound.sent + 1))
    session, _ = receiver.taken_over()
    had, confirmed = names(what for _, what in session.outbound.queue), names(id_ for _, id_ in session.unmarked)
    assert unconfirmed <= had, "it asks for their confirmation"
    assert delivered - receiver.written <= had | confirmed, "it gives none of them again"
    assert not confirmed & unconfirmed, "it lets none of them go"


@pytest.mark.parametrize(("steps", "unmarked"), [(["begin"], {2}), (["write", "begin"], set())])
def test_a_copy_that_begins_has_what_is_confirmed_until_that_is_written(
    monkeypatch: pytest.MonkeyPatch, steps: list[str], unmarked: set[int]
) -> None:
    monkeypatch.setattr(copies, "MARKED", 0)
    receiver = after(True, ["deliver", "confirm", "write", "deliver", "deliver", "confirm", *steps])
    session, _ = receiver.taken_over()
    assert names(id_ for _, id_ in session.unmarked) == unmarked
    assert [number for number, _ in session.outbound.queue] == [3]


def test_what_is_confirmed_before_another_router_has_written_it_stays_until_it_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be given again by whoever has the session next, when it comes."""
    monkeypatch.setattr(copies, "MARKED", 0)
    receiver = after(True, ["deliver", "deliver"])
    receiver.store.unmatched = {b"1"}
    receiver.confirm()
    receiver.confirm()
    for _ in range(2):
        receiver.write()
        assert [id_ for _, id_ in receiver.session.unmarked] == [b"1", b"2"]
    session, _ = receiver.taken_over()
    assert names(what for _, what in session.outbound.queue) == {1, 2}
    receiver.begin()
    session, _ = receiver.taken_over()
    assert names(id_ for _, id_ in session.unmarked) == {1, 2}
    receiver.store.unmatched = set()
    receiver.write()
    assert not receiver.session.unmarked


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("unmatched", [b"3", b"4", b"5"])
def test_what_is_confirmed_with_others_before_another_router_has_written_it_stays_until_it_is_found(
    monkeypatch: pytest.MonkeyPatch, counts: bool, unmatched: bytes
) -> None:
    """One acknowledgement covers many."""
    monkeypatch.setattr(copies, "MARKED", 0)
    receiver = after(counts, ["deliver", "deliver", "confirm", "confirm", "write", "deliver", "deliver", "deliver"])
    receiver.store.unmatched = {unmatched}
    receiver._confirmed(receiver.session.outbound.confirm(5))
    receiver.write()
    session, _ = receiver.taken_over()
    had, confirmed = names(what for _, what in session.outbound.queue), names(id_ for _, id_ in session.unmarked)
    assert int(unmatched) in had | confirmed
    assert not {1, 2} & (had | confirmed)
    receiver.store.unmatched = set()
    receiver.write()
    assert not receiver.session.unmarked
