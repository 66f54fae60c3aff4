"""The forwarding of one router, with a port that notes what it is told; the strategies' suite plays whole clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tidings.cluster.flows import Doubt
from tidings.cluster.forwarding import MAX_OUTSTANDING, Forwarder, Item, Mode, Pending, Sent
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import HERE, Plan
from tidings.cluster.view import ClusterView


class Fixed:
    """A strategy that always says the same."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def locate(self, account: str, resource: str) -> Plan:
        return self.plan

    def view_changed(self, view: ClusterView) -> None:
        """It does not care."""

    def noted(self, node: str, note: bytes) -> None:
        """Nor for this."""

    session_opened = session_closed = noted  # type: ignore[assignment]

    def keeper(self, account: str) -> str:
        return ""


class Port:
    """Notes what is sent, and decides as a router without sessions of its own does: copies for all others."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any, Sent]] = []
        self.guesses: list[bool] = []
        self.full: set[str] = set()
        self.errors: list[Any] = []
        self.decided: list[Any] = []
        self.forwarder: Forwarder = None  # type: ignore[assignment]

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        self.sent.append((node, item.payload, sent))
        self.guesses.append(item.guess)

    def crowded(self, plan: Plan) -> bool:
        return not self.full.isdisjoint((plan.decides, *plan.nodes))

    def decide(self, item: Item, plan: Plan) -> Pending:
        self.decided.append(item.payload)
        if plan.nodes and not item.missed:
            self.forwarder.copies(item, plan, False)
        return None

    def wait(self, pending: Pending, then: Callable[[], None]) -> None:
        """`pending` is a list here, and it is over when what is in it is called."""
        pending.append(then)

    def overflowed(self, item: Item) -> None:
        self.errors.append(item.payload)

    def of(self, node: str) -> list[Any]:
        return [payload for to, payload, _ in self.sent if to == node]

    def answers(self, node: str, payload: Any, taken: bool) -> None:
        sent = next(sent for to, what, sent in self.sent if (to, what) == (node, payload))
        if taken:
            self.forwarder.taken(sent)
        else:
            self.forwarder.refused(sent, 0)


def forwarding(plan: Plan) -> tuple[Forwarder, Port]:
    port = Port()
    forwarder = port.forwarder = Forwarder(Fixed(plan), port)  # type: ignore[arg-type]
    nodes = [Node(name, name, "127.0.0.1", 5777, ("router",), NodeState.UP) for name in ("a", "b", "c", "own")]
    forwarder.view_changed(ClusterView(1, nodes))
    return forwarder, port


def item(number: int, to: str = "juliet@example.org") -> Item:
    return Item(("romeo@example.org", to), to, "", number)


GUESS = Plan(nodes=("a", "b"), certain=False)


def test_a_router_that_hangs_does_not_hold_up_what_another_one_takes() -> None:
    forwarder, port = forwarding(GUESS)
    for number in range(3):
        forwarder.run(item(number))
    assert port.of("a") == [0], "where nobody is known to be, one waits for the answer to the other"
    for number in range(3):
        port.answers("a", number, taken=True)
    assert port.of("a") == [0, 1, 2]
    assert port.of("b") == [0, 1, 2], "whatever b does"


def test_what_nobody_has_taken_waits_for_the_last_answer() -> None:
    """A missing answer is not a no."""
    forwarder, port = forwarding(GUESS)
    forwarder.run(item(0))
    forwarder.run(item(1))
    port.answers("a", 0, taken=False)
    assert port.of("a") == [0]
    assert port.decided == [0]
    port.answers("b", 0, taken=False)
    assert port.decided == [0, 0, 1], "decided anew, for nobody took it; then the next one"


def test_what_was_missed_waits_until_what_went_before_it_is_dealt_with() -> None:
    """It may go elsewhere than the strategy says. Drills, LONG, seed 1: what was for a full JID that had just gone was
    under way as if it were for the account, and the next one to that full JID found its new session first."""
    forwarder, port = forwarding(Plan(nodes=("a",)))
    forwarder.run(item(0))
    forwarder.run(item(1))

    def decide(item: Item, plan: Plan) -> Pending:
        port.decided.append(item.payload)
        if item.payload == 0:
            forwarder.copies(item, plan, False)

    port.decide = decide  # type: ignore[method-assign]
    port.answers("a", 0, taken=False)
    port.answers("a", 1, taken=False)
    assert port.decided == [0, 1, 0]
    forwarder.taken(port.sent[-1][2])
    assert port.decided == [0, 1, 0, 1]


def test_on_a_crowded_link_nothing_more_is_put_until_it_has_room() -> None:
    forwarder, port = forwarding(Plan(decides="a"))
    forwarder.run(item(0))
    port.full.add("a")
    for number in range(1, 100):
        forwarder.run(item(number))
    assert port.of("a") == [0]
    assert forwarder.long(("romeo@example.org", "juliet@example.org")), "its sender should not be read"
    relieved = []
    forwarder.on_relief(("romeo@example.org", "juliet@example.org"), lambda: relieved.append(True))
    port.full.clear()
    forwarder.relieved()
    assert port.of("a") == list(range(100))
    assert relieved == [True]


def test_of_one_flow_only_so_much_is_under_way() -> None:
    forwarder, port = forwarding(Plan(decides="a"))
    for number in range(MAX_OUTSTANDING + 10):
        forwarder.run(item(number))
    assert port.of("a") == list(range(MAX_OUTSTANDING))
    for number in range(10):
        port.answers("a", number, taken=True)
    assert port.of("a") == list(range(MAX_OUTSTANDING + 10))
    assert port.errors == []


def test_what_a_full_link_drops_is_an_error_for_its_sender_and_no_loop() -> None:
    forwarder, port = forwarding(Plan(decides="a"))
    forwarder.run(item(0))
    forwarder.dropped(port.sent[0][2])
    assert port.errors == [0]
    assert port.of("a") == [0]
    assert len(forwarder) == 0


@pytest.mark.parametrize(("died", "missed"), [(True, 1), (False, 3)], ids=["died", "refused"])
def test_a_copy_has_been_missed_by_who_refuses_it_and_not_by_who_has_died(died: bool, missed: int) -> None:
    """It went where the table said. Who takes the sessions over is found by asking again; who refuses has none."""
    forwarder, port = forwarding(HERE)
    copied = item(0)
    copied.missed = 2
    forwarder.copies(copied, Plan(nodes=("b",)), False)
    ((_, _, sent),) = port.sent
    if died:
        forwarder.lost(sent)
    else:
        forwarder.refused(sent, 0)
    assert port.decided == [0]
    assert copied.missed == missed


@pytest.mark.parametrize("safe", [False, True], ids=["nobody waits", "somebody waits"])
def test_a_copy_whose_router_dies_is_decided_about_again_before_what_comes_behind_it(safe: bool) -> None:
    """Drills, seed 58: another session of the account had it; the one whose router hung was taken over, and got it
    only from the other one's end, behind newer ones."""
    forwarder, port = forwarding(Plan(nodes=("a", "b")))
    first = item(1)
    first.waiter = Waits() if safe else None
    forwarder.run(first)
    port.answers("a", 1, taken=True)
    hung = next(sent for to, _, sent in port.sent if to == "b")
    forwarder._strategy.plan = Plan(nodes=("a",))  # type: ignore[attr-defined]
    forwarder.run(item(2))
    assert port.decided == [1], "it waits: the plan is another one"
    forwarder.lost(hung)
    assert port.decided == ([1, 1, 2] if safe else [1, 2])
    assert port.of("a") == ([1, 1, 2] if safe else [1, 2])
    assert first.again is safe


def test_who_has_something_under_way_is_known_until_it_is_dealt_with() -> None:
    forwarder, port = forwarding(Plan(decides="a"))
    forwarder.run(item(0))
    forwarder.run(item(1, "nurse@example.org"))
    assert forwarder.under_way("romeo@example.org")
    port.answers("a", 0, taken=True)
    assert forwarder.under_way("romeo@example.org")
    port.answers("a", 1, taken=True)
    assert not forwarder.under_way("romeo@example.org")


def test_what_came_by_a_newer_view_is_given_back_after_a_while_but_no_note() -> None:
    forwarder, _ = forwarding(Plan(decides="b"))
    answered: list[tuple[Any, bool]] = []

    def incoming(payload: Any, mode: Mode, source: str) -> None:
        flow = ("romeo@example.org", f"{payload}@example.org")
        forwarder.incoming(
            Item(
                flow,
                flow[1],
                "",
                payload,
                mode,
                source=source,
                answer=lambda i: answered.append((i.payload, i.taken)),
            ),
            7,
            0,
        )

    incoming("stanza", Mode.DECIDE, "a")
    incoming(("strategy", b"note"), Mode.STRATEGY, "newcomer")
    forwarder.give_up_waiting()
    assert answered == [], "they have only just come"
    forwarder.give_up_waiting()
    assert answered == [("stanza", False)]


class Waits:
    """Somebody who waits until a message is safe."""

    def __init__(self) -> None:
        self.things = 1

    def expect(self) -> None:
        self.things += 1

    def settle(self) -> None:
        self.things -= 1


def test_what_may_come_back_from_a_silent_router_goes_before_what_goes_elsewhere() -> None:
    """A router has taken a message and stands still before that is safe; then its receiver is at another one."""
    forwarder, port = forwarding(Plan(decides="a"))
    first = item(1)
    first.waiter = Waits()
    forwarder.run(first)
    sent = port.sent[0][2]
    forwarder.taken(sent)
    forwarder.doubt({first.flow: Doubt("a")})
    forwarder.run(item(2))
    assert port.of("a") == [1, 2], "to the same router it goes at once"
    port.answers("a", 2, taken=True)
    forwarder._strategy.plan = Plan(decides="b")  # type: ignore[attr-defined]
    forwarder.run(item(3))
    forwarder.run(item(4, "nurse@example.org"))
    assert port.of("b") == [4]
    forwarder.again([sent])
    forwarder.doubt({})
    assert port.of("b") == [4, 1, 3]


def test_what_is_just_being_decided_about_goes_behind_what_comes_back() -> None:
    """Drills, seed 129: it had waited till what went before was safe at a router, and that one died."""
    forwarder, port = forwarding(Plan(nodes=("a",)))
    first, second = item(1), item(2)
    first.waiter, waits = Waits(), Waits()
    forwarder.run(first)
    sent = port.sent[0][2]
    port.answers("a", 1, taken=True)
    forwarder._strategy.plan = HERE  # type: ignore[attr-defined]
    forwarder.run(second)
    second.waiter = waits
    pending: list[Callable[[], None]] = []
    forwarder.hold(second, pending)
    assert not forwarder.gives_way(second)
    forwarder.again([sent])
    assert forwarder.gives_way(second)
    forwarder.run(item(3))
    assert port.decided == [1, 2]
    pending.pop()()
    assert port.decided == [1, 2, 1, 2, 3]
    assert not waits.things, "it is dealt with once"
    assert not len(forwarder)


def test_nothing_is_dealt_with_here_while_what_went_before_may_come_back() -> None:
    forwarder, port = forwarding(HERE)
    forwarder.doubt({item(1).flow: Doubt("a")})
    assert not forwarder.is_here(item(1).flow, "juliet@example.org", "")
    forwarder.run(item(1))
    assert port.decided == []
    forwarder.doubt({})
    assert port.decided == [1]
    assert forwarder.is_here(item(1).flow, "juliet@example.org", "")


def test_nothing_goes_past_what_a_silent_router_has_taken_though_copies_go_there_too() -> None:
    """Its receiver may be at the other one by now: copies say nothing of that."""
    forwarder, port = forwarding(GUESS)
    forwarder.run(item(1))
    port.answers("a", 1, taken=True)
    forwarder.doubt({item(1).flow: Doubt("a")})
    forwarder.run(item(2))
    assert port.of("b") == [1, 2], "it answers: what it has taken only takes long to be written"
    port.answers("a", 2, taken=True)
    forwarder.doubt({item(1).flow: Doubt("a", silent=True)})
    forwarder.run(item(3))
    forwarder.run(item(4, "nurse@example.org"))
    assert port.of("b") == [1, 2, 4]
    forwarder.doubt({})
    assert port.of("b") == [1, 2, 4, 3]


class SlowPort(Port):
    """Takes its time with every stanza."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def decide(self, item: Item, plan: Plan) -> Pending:
        self.decided.append(item.payload)
        item.taken = item.payload != 1
        return "later" if item.payload == 1 else None

    def wait(self, pending: Pending, then: Callable[[], None]) -> None:
        self.waiting.append(then)


def test_what_waited_behind_a_stanza_that_is_refused_is_refused_too() -> None:
    """Its sender sends both again, in order."""
    forwarder, _ = forwarding(HERE)
    port = SlowPort()
    forwarder._port = port  # type: ignore[assignment]
    answers: list[tuple[Any, bool]] = []

    def incoming(number: int, refusals_seen: int) -> None:
        copy = item(number)
        copy.mode, copy.source = Mode.SESSIONS, "a"
        copy.answer = lambda item: answers.append((item.payload, item.taken))
        forwarder.incoming(copy, 0, refusals_seen)

    incoming(1, 0)
    incoming(2, 0)
    assert answers == []
    port.waiting.pop()()
    assert answers == [(1, False), (2, False)]
    incoming(3, 0)
    assert answers[2:] == [(3, False)]
    incoming(4, 3)
    assert answers[3:] == [(4, True)], "its sender knows"


def test_who_was_only_asked_and_has_nobody_refuses_nothing_behind_it() -> None:
    """Another router has taken that one, so nothing comes back, and the next one may be for sessions here, too. Plays,
    `broadcast`: behind a headline for one device, presence for the account reached that device only, where the other
    router's refusal of the headline was slow."""
    forwarder, _ = forwarding(HERE)
    port = SlowPort()
    forwarder._port = port  # type: ignore[assignment]
    answers: list[tuple[Any, bool]] = []
    for number in (1, 2):
        copy = item(number)
        copy.mode, copy.source, copy.guess = Mode.SESSIONS, "a", True
        copy.answer = lambda item: answers.append((item.payload, item.taken))
        forwarder.incoming(copy, 0, 0)
    port.waiting.pop()()
    assert answers == [(1, False), (2, True)]


@pytest.mark.parametrize("guess", [False, True])
def test_a_copy_says_whether_it_is_known_who_takes_it(guess: bool) -> None:
    forwarder, port = forwarding(Plan(nodes=("a", "b"), certain=not guess))
    forwarder.run(item(0))
    assert [sent.group.certain for _, _, sent in port.sent if sent.group] == [not guess] * 2
    assert port.guesses == [guess] * 2


@pytest.mark.parametrize("to", ["", "balcony"], ids=["account", "full JID"])
def test_a_router_that_dies_behind_its_answer_is_seen_before_the_last_one_has_answered(to: str) -> None:
    """What it has taken is gone with it, though others are still asked."""
    forwarder, port = forwarding(Plan(nodes=("a", "b")))
    first = item(1)
    first.resource = to
    first.waiter = Waits()
    forwarder.run(first)
    sent = next(sent for node, _, sent in port.sent if node == "a")
    port.answers("a", 1, taken=True)
    forwarder._strategy.plan = HERE  # type: ignore[attr-defined]
    forwarder.again([sent])
    assert port.decided == [1]
    port.answers("b", 1, taken=False)
    assert port.decided == [1, 1], "nobody alive has it"
    assert first.missed == 1


def test_it_is_known_who_of_the_living_has_what_comes_back() -> None:
    forwarder, port = forwarding(Plan(nodes=("a", "b")))
    first = item(1)
    waiter = first.waiter = Waits()
    forwarder.run(first)
    sent = next(sent for node, _, sent in port.sent if node == "a")
    port.answers("a", 1, taken=True)
    port.answers("b", 1, taken=True)
    assert first.waiter is None
    sent.waiter = waiter
    forwarder._strategy.plan = HERE  # type: ignore[attr-defined]
    forwarder.again([sent])
    assert first.takers == ("b",)
    assert first.again


def test_who_takes_what_is_for_a_full_jid_has_its_session_whoever_else_dies() -> None:
    forwarder, port = forwarding(Plan(nodes=("a", "b")))
    first = item(1)
    first.resource = "balcony"
    first.waiter = Waits()
    forwarder.run(first)
    forwarder.lost(next(sent for node, _, sent in port.sent if node == "b"))
    port.answers("a", 1, taken=True)
    assert port.decided == [1]
    assert first.waiter is None
