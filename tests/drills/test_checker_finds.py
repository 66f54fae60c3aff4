"""The checker against histories that nobody wrote by hand: a correct one is never found faulty, and one planted fault
is always found. The histories come from a small model of a server that keeps the promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drills.checker import (
    ANSWERED_TWICE,
    DISORDERED,
    DOUBLED,
    LOST,
    PHANTOM,
    UNANSWERED,
    WRONG_PRESENCE,
    check,
)
from tests.drills.history import (
    Acknowledged,
    Answered,
    Asked,
    Available,
    Began,
    Bounced,
    Confirmed,
    Cut,
    Ended,
    Event,
    Managed,
    Received,
    Resumed,
    Saw,
    Sent,
)
from tests.drills.lives import account_of

DEVICES = ("a@x/1", "a@x/2", "b@x/1", "c@x/1")
# The account that has one device: between its sessions and those of others order has no exceptions.
SINGLE = "c@x"
RESUMPTION = 300.0
# Every history has this one message, request and sight; faults have something to be planted in.
ANCHORS = ("b@x/1", "c@x/1")


@dataclass
class Device:
    """One client and the server's side of its session."""

    jid: str
    session: str = ""
    cut: bool = False
    # What the server has for it, what it has taken, and what it has sent and not seen acknowledged.
    queue: list[str] = field(default_factory=list)
    unconfirmed: list[str] = field(default_factory=list)
    unacknowledged: list[str] = field(default_factory=list)

    @property
    def account(self) -> str:
        return account_of(self.jid)

    @property
    def works(self) -> bool:
        return bool(self.session) and not self.cut


class Model:
    """A server that keeps the promise, and clients that do what they are told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.devices = {jid: Device(jid) for jid in DEVICES}
        self.sent: dict[str, Sent] = {}
        self.confirmed: set[str] = set()
        # By account, in the order of sending: what is stored.
        self.stored: dict[str, list[str]] = {device.account: [] for device in self.devices.values()}
        self._sessions = 0

    @property
    def at(self) -> float:
        return len(self.events) * 0.1

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def begin(self, jid: str) -> None:
        device = self.devices[jid]
        if device.session:
            return
        self._sessions += 1
        device.session, device.cut = f"{jid}#{self._sessions}", False
        device.unacknowledged = []
        self.tell(Began(self.at, device.session, jid))
        self.tell(Managed(self.at, device.session, RESUMPTION))
        self.tell(Available(self.at, device.session))
        stored, self.stored[device.account] = self.stored[device.account], []
        device.queue, device.unconfirmed = [key for key in stored if key not in self.confirmed], []

    def cut(self, jid: str) -> None:
        device = self.devices[jid]
        if device.works:
            device.cut = True
            self.tell(Cut(self.at, device.session))

    def resume(self, jid: str) -> None:
        device = self.devices[jid]
        if device.session and device.cut:
            device.cut = False
            self.tell(Resumed(self.at, device.session))

    def end(self, jid: str) -> None:
        device = self.devices[jid]
        if not device.session:
            return
        self.tell(Ended(self.at, device.session, device.works))
        left = [*device.unconfirmed, *device.queue]
        device.session, device.queue, device.unconfirmed = "", [], []
        held = {key for other in self._sessions_of(device.account) for key in (*other.queue, *other.unconfirmed)}
        stored = self.stored[device.account]
        stored += [
            key for key in left
            if key not in self.confirmed and key not in held and self.sent[key].type != "headline"
        ]  # fmt: skip
        stored.sort(key=list(self.sent).index)

    def _sessions_of(self, account: str) -> list[Device]:
        return [device for device in self.devices.values() if device.session and device.account == account]

    def send(self, jid: str, to: str, type_: str) -> None:
        device = self.devices[jid]
        if not device.works:
            return
        key = f"m{len(self.sent) + 1}"
        self.sent[key] = Sent(self.at, device.session, key, to, type_, f"body of {key}")
        self.tell(self.sent[key])
        device.unacknowledged.append(key)
        there = self._sessions_of(account_of(to))
        exact = [receiver for receiver in there if receiver.jid == to]
        if exact or (there and (type_ == "chat" or "/" not in to)):
            for receiver in exact or there:
                receiver.queue.append(key)
        elif type_ == "chat" or (type_ == "normal" and "/" not in to):
            self.stored[account_of(to)].append(key)
        elif type_ == "normal":
            self.tell(Bounced(self.at, device.session, key, "service-unavailable"))

    def acknowledge(self, jid: str) -> None:
        device = self.devices[jid]
        if device.works and device.unacknowledged:
            self.tell(Acknowledged(self.at, device.session, tuple(device.unacknowledged)))
            device.unacknowledged = []

    def deliver(self, jid: str) -> None:
        device = self.devices[jid]
        if device.works and device.queue:
            key = device.queue.pop(0)
            device.unconfirmed.append(key)
            sent = self.sent[key]
            self.tell(Received(self.at, device.session, key, sent.session.partition("#")[0], sent.body))

    def confirm(self, jid: str) -> None:
        device = self.devices[jid]
        if device.works and device.unconfirmed:
            self.tell(Confirmed(self.at, device.session, tuple(device.unconfirmed)))
            self.confirmed.update(device.unconfirmed)
            device.unconfirmed = []

    def ask(self, jid: str, to: str) -> None:
        device = self.devices[jid]
        if device.works:
            key = f"q{len(self.events)}"
            self.tell(Asked(self.at, device.session, key, to))
            self.tell(Answered(self.at, device.session, key, to))

    def settle(self) -> None:
        """Everybody comes back, and takes what there is."""
        for jid, device in self.devices.items():
            self.resume(jid)
            self.begin(jid)
            while device.queue:
                self.deliver(jid)
            self.acknowledge(jid)


STEPS: list[Callable[[Model, str, str], None]] = [
    lambda model, one, other: model.begin(one),
    lambda model, one, other: model.cut(one),
    lambda model, one, other: model.resume(one),
    lambda model, one, other: model.end(one),
    lambda model, one, other: model.send(one, other, "chat"),
    lambda model, one, other: model.send(one, account_of(other), "chat"),
    lambda model, one, other: model.send(one, other, "normal"),
    lambda model, one, other: model.send(one, account_of(other), "headline"),
    lambda model, one, other: model.acknowledge(one),
    lambda model, one, other: model.deliver(one),
    lambda model, one, other: model.deliver(one),
    lambda model, one, other: model.confirm(one),
    lambda model, one, other: model.ask(one, other),
]
steps = st.lists(
    st.tuples(st.integers(0, len(STEPS) - 1), st.sampled_from(DEVICES), st.sampled_from(DEVICES)), max_size=120
)


def played(chosen: Sequence[tuple[int, str, str]]) -> list[Event]:
    model = Model()
    sender, receiver = ANCHORS
    for jid in ANCHORS:
        model.begin(jid)
    for _ in range(2):
        model.send(sender, receiver, "chat")
    model.ask(sender, receiver)
    model.deliver(receiver)
    model.deliver(receiver)
    model.acknowledge(sender)
    for number, one, other in chosen:
        if one != other:
            STEPS[number](model, one, other)
    model.settle()
    return model.events


@settings(max_examples=400)
@given(steps)
def test_a_correct_history_is_never_found_faulty(chosen: list[tuple[int, str, str]]) -> None:
    assert [str(finding) for finding in check(played(chosen)).findings] == []
    assert [str(finding) for finding in check(played(chosen), patient=False).findings] == []


def received(events: list[Event]) -> list[int]:
    return [number for number, event in enumerate(events) if isinstance(event, Received)]


def lose(events: list[Event], random: Random) -> list[Event]:
    """Nobody ever gets one of the messages that were acknowledged and that absence is no excuse for."""
    acknowledged = {key for event in events if isinstance(event, Acknowledged) for key in event.keys}
    chosen = random.choice(
        [
            event.key
            for event in events
            if isinstance(event, Sent) and event.key in acknowledged and event.type == "chat"
        ]
    )
    return [
        replace(event, keys=tuple(key for key in event.keys if key != chosen))
        if isinstance(event, Confirmed)
        else event
        for event in events
        if not (isinstance(event, Received) and event.key == chosen)
    ]


def double(events: list[Event], random: Random) -> list[Event]:
    """One session gets what it had, a little later."""
    place = random.choice(received(events))
    return [*events[: place + 1], events[place], *events[place + 1 :]]


def disorder(events: list[Event], random: Random) -> list[Event]:
    """A session of the account with one device gets two messages of one sender's session the other way round."""
    sender = {event.key: event.session for event in events if isinstance(event, Sent)}
    pairs = [
        (i, j)
        for i in received(events)
        for j in received(events)
        if i < j
        and events[i].session == events[j].session
        and events[i].session.startswith(SINGLE)
        and sender[events[i].key] == sender[events[j].key]  # type: ignore[attr-defined]
    ]
    i, j = random.choice(pairs)
    changed = list(events)
    one, other = events[i], events[j]
    assert isinstance(one, Received)
    assert isinstance(other, Received)
    changed[i] = replace(one, key=other.key, body=other.body)
    changed[j] = replace(other, key=one.key, body=one.body)
    return changed


def invent(events: list[Event], random: Random) -> list[Event]:
    """Somebody gets what nobody sent."""
    place = random.choice(received(events))
    event = events[place]
    assert isinstance(event, Received)
    return [*events[:place], replace(event, key="invented"), *events[place:]]


def change(events: list[Event], random: Random) -> list[Event]:
    """A byte of a body is another one."""
    place = random.choice(received(events))
    event = events[place]
    assert isinstance(event, Received)
    return [*events[:place], replace(event, body=event.body + " "), *events[place + 1 :]]


def answers(events: list[Event]) -> list[int]:
    return [number for number, event in enumerate(events) if isinstance(event, Answered)]


def silence(events: list[Event], random: Random) -> list[Event]:
    """An answer never comes, and its asker, who is one that stays, waits a minute longer."""
    ended = {event.session for event in events if isinstance(event, Ended)}
    candidates = [place for place in answers(events) if events[place].session not in ended]
    last = events[-1]
    if not candidates:
        asker = next(event.session for event in reversed(events) if isinstance(event, Began))
        return [*events, Asked(last.at, asker, "q", "b@x/1"), Acknowledged(last.at + 60, asker, ())]
    place = random.choice(candidates)
    return [*events[:place], *events[place + 1 :], Acknowledged(last.at + 60, events[place].session, ())]


def answer_again(events: list[Event], random: Random) -> list[Event]:
    place = random.choice(answers(events))
    return [*events[:place], events[place], *events[place:]]


def show(events: list[Event], random: Random) -> list[Event]:
    """Long after, somebody who stays sees a session go that stays, too."""
    ended = {event.session for event in events if isinstance(event, Ended)}
    stayed = [event for event in events if isinstance(event, Began) and event.session not in ended]
    contact, other = random.sample(stayed, 2)
    last = events[-1].at + 60
    return [*events, Saw(last, contact.session, other.jid, True), Saw(last, contact.session, other.jid, False)]


PLANTED = [
    (lose, LOST), (double, DOUBLED), (disorder, DISORDERED), (invent, PHANTOM), (change, PHANTOM),
    (silence, UNANSWERED), (answer_again, ANSWERED_TWICE), (show, WRONG_PRESENCE),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "kind"), PLANTED, ids=[plant.__name__ for plant, _ in PLANTED])
@given(chosen=steps, random=st.randoms(use_true_random=False))
def test_one_planted_fault_is_always_found(
    plant: Callable[[list[Event], Random], list[Event]], kind: str, chosen: list[tuple[int, str, str]], random: Random
) -> None:
    assert check(plant(played(chosen), random)).count(kind) >= 1
