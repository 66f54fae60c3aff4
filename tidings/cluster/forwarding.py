"""How stanzas get from router to router: by the strategy's plans, in order, lost nowhere. Pure.

What belongs together is a flow: all that one account sends to another. Within a flow nothing overtakes.
A stanza goes on at once while nothing of its flow waits; it is `Sent` until its receiver has dealt with it.

A receiver refuses what is not its own (it is not the one that decides, by its view) or what nobody there takes.
Then the sender has it back, with all that it sent behind it in this flow: the receiver refuses those as well,
until one comes whose sender knew of the refusal. When all of them are back the sender goes on with the first, by
the view that the receiver had. Nothing is passed on a second time: who gets a stanza from another router deals
with it or refuses.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from tidings.cluster.strategy import HERE, Plan, Strategy
from tidings.cluster.view import ClusterView

# Stanzas that may wait in one flow; more are refused to their sender (`Port.overflowed`). It stops one account
# from filling memory while another router is away.
MAX_WAITING = 1000
# From so many on, whoever can hold its own sources back does so (`Forwarder.long`).
HIGH = 64


class Mode(IntEnum):
    """What the receiver does with it. The values are those of common.v1.Forwarding."""

    DECIDE = 1
    SESSIONS = 2
    NOTE = 3
    STRATEGY = 4


@dataclass(slots=True, eq=False)
class Item:
    """One stanza (or note) on its way; `payload` is whatever the router makes of it."""

    # The flow: sender's and receiver's bare JIDs; at a router that got it from another one, that one too, for what
    # comes from there must not wait for what goes there.
    flow: tuple[str, ...]
    # To whom: the account, and the resource or ''.
    account: str
    resource: str
    payload: Any
    mode: Mode = Mode.DECIDE
    # What the router knows of who sent it; stays in this router.
    origin: Any = None
    # Where it came from: the incarnation of another router, '' from this one.
    source: str = ""
    # How often nobody took it.
    missed: int = 0
    # Said by who deals with it, when it came from another router: whether somebody took it, and an answer.
    taken: bool = True
    content: bytes = b""
    # Tells its source; None when it came from this router.
    answer: Callable[[Item], None] | None = None
    order: int = 0


# What dealing with an item returns: None when it is done, or something to wait for.
Pending = Any


class Port(Protocol):
    """The router, as its forwarding sees it."""

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        """Puts an item on the link to a router. Later exactly one of `taken`, `refused` and `lost` of the
        forwarder MUST be called for it, in the order of the receiver's answers."""

    def decide(self, item: Item, plan: Plan) -> Pending:
        """Applies the rules of the account, or does what the item's mode says."""

    def wait(self, pending: Pending, then: Callable[[], None]) -> None:
        """Calls `then` when it is done, also when it has failed."""

    def overflowed(self, item: Item) -> None:
        """The item can't wait any longer: its sender gets an error."""


class Sent:
    """An item that a link carries, till its receiver has said what became of it."""

    __slots__ = ("flow", "group", "item", "node")

    def __init__(self, flow: _Flow | None, item: Item, node: str, group: _Group | None) -> None:
        self.flow = flow
        self.item = item
        self.node = node
        self.group = group


class _Group:
    """The copies of one item; `done` is told when all are answered."""

    __slots__ = ("certain", "contents", "done", "left", "taken")

    def __init__(self, left: int, certain: bool, taken: bool, done: Callable[[_Group], None]) -> None:
        self.left = left
        self.certain = certain
        self.taken = taken
        self.contents: list[bytes] = []
        self.done = done


class _Flow:
    """What is under way from one account to another."""

    __slots__ = ("busy", "drains", "key", "needs", "outstanding", "plan", "queue", "relief", "returned")

    def __init__(self, key: tuple[str, ...]) -> None:
        self.key = key
        # What waits here, in order.
        self.queue: deque[Item] = deque()
        # What came back; in its old order once all are back.
        self.returned: list[Item] = []
        # How many are sent and not answered, and by which plan. By another one nothing is sent before they are.
        self.outstanding = 0
        self.plan = HERE
        # Something is being dealt with, or its answers are waited for one by one.
        self.busy = 0
        # The view that is waited for.
        self.needs = 0
        # Something was refused: nothing more is sent until all that is under way is answered.
        self.drains = False
        self.relief: list[Callable[[], None]] = []

    @property
    def blocked(self) -> bool:
        return bool(self.busy or self.queue or self.returned or self.drains)


class Forwarder:
    """One router's forwarding."""

    def __init__(self, strategy: Strategy, port: Port) -> None:
        self._strategy = strategy
        self._port = port
        self._flows: dict[tuple[str, ...], _Flow] = {}
        self._order = 0
        # Notes of the strategy that are not taken yet, and who waits for which of them.
        self._telling: set[Sent] = set()
        self._tellers: list[tuple[set[Sent], Callable[[], None]]] = []
        # By router: how many refusals of it we have taken, and how many it got from us; and the flows of which
        # something was refused to it, with the number of that refusal, oldest first.
        self._seen: dict[str, int] = {}
        self._given: dict[str, int] = {}
        self._latched: dict[str, OrderedDict[tuple[str, ...], int]] = {}
        # What came by a view that is newer than ours, or from a router that is not in it yet, by flow.
        self._early: dict[tuple[str, ...], list[tuple[Item, int, int]]] = {}
        self._sources: frozenset[str] = frozenset()
        self.view = ClusterView()
        # Totals, for metrics.
        self.sent = 0
        self.refusals = 0

    def __len__(self) -> int:
        """Flows with something under way."""
        return len(self._flows)

    # --- what this router sends ---

    def run(self, item: Item) -> Pending:
        """Sends an item of this router on its way. Returns what its sender should wait for, if anything."""
        flow = self._flows.get(item.flow) if self._flows else None
        if flow is not None and flow.blocked:
            if len(flow.queue) >= MAX_WAITING:
                self._port.overflowed(item)
            else:
                flow.queue.append(item)
            return None
        plan = self._strategy.locate(item.account, item.resource)
        if flow is not None and flow.outstanding and plan != flow.plan:
            # What is on its way to somewhere else must be dealt with first.
            flow.queue.append(item)
            return None
        if not plan.decides:
            return self._port.decide(item, plan)
        self._send_decide(flow or self._open(item.flow), item, plan)
        return None

    def long(self, key: tuple[str, ...]) -> bool:
        """Whether so much waits in a flow that its sender should not be read for a while."""
        flow = self._flows.get(key)
        return flow is not None and len(flow.queue) >= HIGH

    def under_way(self, account: str) -> bool:
        """Whether something that an account of this router sent has not been dealt with."""
        return any(key[0] == account and len(key) == 2 for key in self._flows)

    def on_relief(self, key: tuple[str, ...], then: Callable[[], None]) -> None:
        """Calls `then` when nothing waits in a flow any more."""
        flow = self._flows.get(key)
        if flow is None:
            then()
        else:
            flow.relief.append(then)

    def copies(self, item: Item, plan: Plan, taken: bool) -> None:
        """For who decides: copies of an item to the other routers of a plan, for their sessions.

        `taken`: whether sessions here have taken it. When nobody takes it, it is decided about again, with a
        higher `missed`. Where the plan is a guess, the flow waits for the answers.
        """
        flow = self._open(item.flow)
        flow.plan = plan
        wait = not plan.certain and not taken
        if wait:
            flow.busy += 1

        def done(group: _Group) -> None:
            if wait:
                flow.busy -= 1
            if group.taken:
                self._finished(item)
            else:
                item.missed += 1
                flow.returned.append(item)
            self._settle(flow)

        group = _Group(len(plan.nodes), plan.certain, taken, done)
        if not item.order:
            item.order = self._next()
        copy = Item(item.flow[:2], item.account, item.resource, item.payload, Mode.SESSIONS)
        for node in plan.nodes:
            flow.outstanding += 1
            self._send(node, copy, Sent(flow, item, node, group))

    def ask(self, nodes: Sequence[str], item: Item, then: Callable[[list[bytes]], None]) -> None:
        """Sends a note to other routers; `then` gets the answers of those that took it."""
        if not nodes:
            then([])
            return
        group = _Group(len(nodes), False, False, lambda group: then(group.contents))
        for node in nodes:
            self._send(node, item, Sent(None, item, node, group))

    def tell(self, node: str, note: bytes) -> None:
        """Sends a note of the strategy (`tidings.cluster.strategy.Context`)."""
        item = Item(("", ""), "", "", ("strategy", note), Mode.STRATEGY)
        sent = Sent(None, item, node, None)
        self._telling.add(sent)
        self._send(node, item, sent)

    def on_told(self, then: Callable[[], None]) -> None:
        """Calls `then` when the notes that are under way now have been taken."""
        if self._telling:
            self._tellers.append((set(self._telling), then))
        else:
            then()

    # --- what becomes of it ---

    def taken(self, sent: Sent, content: bytes = b"") -> None:
        """The receiver has dealt with it."""
        group = sent.group
        if group is not None:
            group.taken = True
            group.contents.append(content)
        self._answered(sent)

    def refused(self, sent: Sent, version: int) -> None:
        """The receiver has not taken it; `version`: the view by which it is not the one that decides, or 0."""
        if sent.flow is not None:
            self.refusals += 1
            self._seen[sent.node] = self._seen.get(sent.node, 0) + 1
        self._returned(sent, version)

    def lost(self, sent: Sent) -> None:
        """The receiver is no more. Whether it had dealt with it cannot be known; it is sent another way."""
        self._returned(sent, 0)

    def _returned(self, sent: Sent, version: int) -> None:
        flow, group = sent.flow, sent.group
        if flow is not None:
            if group is None:
                flow.returned.append(sent.item)
                flow.needs = max(flow.needs, version)
            elif group.certain:
                flow.drains = True
        self._answered(sent)

    def _answered(self, sent: Sent) -> None:
        flow, group = sent.flow, sent.group
        if sent in self._telling:
            self._told(sent)
        if flow is not None:
            flow.outstanding -= 1
        if group is not None:
            group.left -= 1
            if not group.left:
                group.done(group)
                return
        if flow is not None:
            self._settle(flow)

    def _told(self, sent: Sent) -> None:
        self._telling.discard(sent)
        for waiting, _ in self._tellers:
            waiting.discard(sent)
        ready = [then for waiting, then in self._tellers if not waiting]
        self._tellers = [entry for entry in self._tellers if entry[0]]
        for then in ready:
            then()

    # --- what other routers send ---

    def incoming(self, item: Item, version: int, refusals_seen: int) -> None:
        """Takes an item of another router; its `answer` is called when it is dealt with, or refused at once.

        `version`: the view by which it was sent here. How many may wait is bounded by the link.
        """
        key = item.flow = (*item.flow, item.source)
        if (self._early and key in self._early) or item.source not in self._sources:
            self._early.setdefault(key, []).append((item, version, refusals_seen))
            return
        if item.mode is Mode.STRATEGY:
            self._strategy.noted(item.source, item.payload[1])
            self._finished(item)
            return
        if item.mode in (Mode.DECIDE, Mode.SESSIONS) and self._is_latched(item, refusals_seen):
            self._refuse(item)
            return
        if item.mode is Mode.DECIDE and self._strategy.locate(item.account, item.resource).decides:
            if version > self.view.version:
                self._early[key] = [(item, version, refusals_seen)]
            else:
                self._refuse(item)
            return
        flow = self._flows.get(key) if self._flows else None
        plan = self._strategy.locate(item.account, item.resource) if item.mode is Mode.DECIDE else HERE
        if flow is not None and (flow.blocked or (flow.outstanding and plan != flow.plan)):
            flow.queue.append(item)
            return
        pending = self._port.decide(item, plan)
        if pending is None:
            self._done(item)
        else:
            self._hold(flow or self._open(key), item, pending)

    def view_changed(self, view: ClusterView) -> None:
        """There is a newer view. The strategy is told first, then what waited for it goes on."""
        self.view = view
        self._sources = frozenset(node.incarnation for node in view.with_router_sessions())
        known: tuple[dict[str, Any], ...] = (self._latched, self._seen, self._given)
        for by_router in known:
            for gone in set(by_router) - self._sources:
                del by_router[gone]
        self._strategy.view_changed(view)
        early, self._early = self._early, {}
        for waiting in early.values():
            for item, version, seen in waiting:
                item.flow = item.flow[:2]
                self.incoming(item, version, seen)
        for flow in list(self._flows.values()):
            self._settle(flow)

    def give_up_waiting(self) -> None:
        """What came by a newer view has waited long enough for it: it goes back to who sent it."""
        early, self._early = self._early, {}
        for waiting in early.values():
            for item, _, _ in waiting:
                self._refuse(item)

    # --- within ---

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _open(self, key: tuple[str, ...]) -> _Flow:
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(key)
        return flow

    def _send_decide(self, flow: _Flow, item: Item, plan: Plan) -> None:
        flow.plan = plan
        flow.outstanding += 1
        item.order = item.order or self._next()
        self._send(plan.decides, item, Sent(flow, item, plan.decides, None))

    def _send(self, node: str, item: Item, sent: Sent) -> None:
        self.sent += 1
        self._port.send(node, item, sent, self._seen.get(node, 0))

    def _hold(self, flow: _Flow, item: Item, pending: Pending) -> None:
        """Lets the flow wait until an item is dealt with."""
        flow.busy += 1

        def done() -> None:
            flow.busy -= 1
            self._done(item)
            self._settle(flow)

        self._port.wait(pending, done)

    def _done(self, item: Item) -> None:
        """An item that came from another router has been dealt with, or is on its way to further sessions."""
        if item.answer is None:
            return
        if not item.taken and item.mode is Mode.SESSIONS:
            self._refuse(item)
        else:
            self._finished(item)

    def _finished(self, item: Item) -> None:
        answer, item.answer = item.answer, None
        if answer is not None:
            answer(item)

    def _refuse(self, item: Item) -> None:
        source = item.source
        if item.mode in (Mode.DECIDE, Mode.SESSIONS):
            number = self._given[source] = self._given.get(source, 0) + 1
            latched = self._latched.setdefault(source, OrderedDict())
            latched[item.flow] = number
            latched.move_to_end(item.flow)
        item.taken = False
        self._finished(item)

    def _is_latched(self, item: Item, refusals_seen: int) -> bool:
        latched = self._latched.get(item.source)
        if not latched:
            return False
        refusal = latched.get(item.flow)
        while latched and next(iter(latched.values())) <= refusals_seen:
            # Its sender knows, and on a link nothing overtakes: no one needs to be told again.
            latched.popitem(last=False)
        return refusal is not None and refusal > refusals_seen

    def _settle(self, flow: _Flow) -> None:
        """Goes on with what waits in a flow, when it may."""
        while not flow.busy:
            if flow.returned or flow.drains:
                if flow.outstanding:
                    return
                flow.returned.sort(key=lambda item: item.order)
                flow.queue.extendleft(reversed(flow.returned))
                flow.returned.clear()
                flow.drains = False
            if not flow.queue:
                break
            if flow.needs > self.view.version:
                return
            item = flow.queue[0]
            plan = HERE
            if item.mode is Mode.DECIDE:
                plan = self._strategy.locate(item.account, item.resource)
                if flow.outstanding and plan != flow.plan:
                    return
            flow.queue.popleft()
            if plan.decides:
                if item.source:
                    self._refuse(item)
                else:
                    self._send_decide(flow, item, plan)
                continue
            pending = self._port.decide(item, plan)
            if pending is None:
                self._done(item)
            else:
                self._hold(flow, item, pending)
        if not flow.queue:
            for then in flow.relief:
                then()
            flow.relief.clear()
            if not flow.busy and not flow.returned and not flow.outstanding and self._flows.get(flow.key) is flow:
                del self._flows[flow.key]
