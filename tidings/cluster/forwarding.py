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

from collections.abc import Callable, Sequence

from tidings.cluster.flows import Doubt, Flow, Group, Item, Mode, Pending, Port, Sent
from tidings.cluster.refusals import Refusals
from tidings.cluster.strategy import HERE, Plan, Strategy
from tidings.cluster.telling import Telling
from tidings.cluster.view import ClusterView

__all__ = ["Forwarder", "Item", "Mode", "Pending", "Port", "Sent"]

# Stanzas that may wait in one flow; more are refused to their sender (`Port.overflowed`). It stops one account
# from filling memory while another router is away.
MAX_WAITING = 1000
# Stanzas of one flow that may be under way to another router; further ones wait here.
MAX_OUTSTANDING = 1000
# From so many on, whoever can hold its own sources back does so (`Forwarder.long`); of one flow, and of flows of one
# sender.
HIGH = 64
MANY = 64


class Forwarder:
    """One router's forwarding."""

    def __init__(self, strategy: Strategy, port: Port) -> None:
        self._strategy = strategy
        self._port = port
        self._flows: dict[tuple[str, ...], Flow] = {}
        self._order = 0
        self._telling = Telling()
        self._refusals = Refusals()
        # What came by a view that is newer than ours, or from a router that is not in it yet, by flow; and which
        # of these flows were there when it was looked before.
        self._early: dict[tuple[str, ...], list[tuple[Item, int, int]]] = {}
        self._overdue: set[tuple[str, ...]] = set()
        # How many flows there are with something that an account of this router sent.
        self._senders: dict[str, int] = {}
        self._sources: frozenset[str] = frozenset()
        # Flows of which a router has taken something, and has not said for long that it is safe; see `doubt`.
        self.doubts: dict[tuple[str, ...], Doubt] = {}
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
                _settled(item)
            else:
                flow.queue.append(item)
            return None
        plan = self._strategy.locate(item.account, item.resource)
        if self.doubts and self._is_doubtful(item.flow, plan):
            (flow or self._open(item.flow)).queue.append(item)
            return None
        if (plan.decides or plan.nodes or flow is not None) and self._must_wait(flow, plan):
            (flow or self._open(item.flow)).queue.append(item)
            return None
        if not plan.decides:
            pending = self._port.decide(item, plan)
            if pending is None and item.waiter is not None:
                self.dealt(item)
            return pending
        self._send_decide(flow or self._open(item.flow), item, plan)
        return None

    def hold(self, item: Item, pending: Pending) -> None:
        """Lets what the same sender sends to the same account wait for what `run` has returned, and nothing else."""
        self._hold(self._open(item.flow), item, pending)

    def dealt(self, item: Item) -> None:
        """What `run` has had its sender wait for is over."""
        self._done(item)

    def is_here(self, key: tuple[str, ...], account: str, resource: str) -> bool:
        """Whether this router alone deals with a stanza, at once: then there is nothing to be kept in order."""
        return (
            key not in self._flows
            and self._strategy.locate(account, resource) is HERE
            and (not self.doubts or key not in self.doubts)
        )

    def long(self, key: tuple[str, ...]) -> bool:
        """Whether so much waits in a flow, or so many flows of its sender are under way, that the sender should not
        be read for a while."""
        flow = self._flows.get(key)
        return flow is not None and (len(flow.queue) >= HIGH or self._senders.get(key[0], 0) > MANY)

    def under_way(self, account: str) -> bool:
        """Whether something that an account of this router sent has not been dealt with."""
        return account in self._senders

    def on_relief(self, key: tuple[str, ...], then: Callable[[], None]) -> None:
        """Calls `then` the next time that nothing waits in a flow, at the latest when all of it is dealt with."""
        flow = self._flows.get(key)
        if flow is None:
            then()
        else:
            flow.relief.append(then)

    def copies(self, item: Item, plan: Plan, taken: bool) -> None:
        """For who decides: copies of an item to the other routers of a plan, for their sessions.

        `taken`: whether sessions here have taken it. When nobody takes it, it is decided about again, with a
        higher `missed`; and so it is, as one that comes `again`, when somebody waits for it and a router has died
        that got a copy. Where the plan is a guess, the flow waits for the answers.
        """
        flow = self._open(item.flow)
        flow.plan = plan

        def first() -> None:
            # Somebody has it, so the next one may go: a router that hangs does not hold up those that answer.
            flow.busy -= 1
            self._settle(flow)

        def done(group: Group) -> None:
            item.copies = None
            if not group.taken and not item.takers:
                item.missed += 1
                flow.returned.append(item)
            elif group.lost and item.waiter is not None:
                # Others know it by its number; the sessions of the one that has died go on elsewhere, and get it
                # before what comes behind it.
                item.again = True
                flow.returned.append(item)
            else:
                self._finished(item)
            self._settle(flow)

        item.copies = group = Group(len(plan.nodes), plan.certain, taken, done)
        if not plan.certain and not taken:
            flow.busy += 1
            group.first = first
        if not item.order:
            item.order = self._next()
        copy = Item(item.flow[:2], item.account, item.resource, item.payload, Mode.SESSIONS, guess=not plan.certain)
        for node in plan.nodes:
            flow.outstanding += 1
            self._send(node, copy, Sent(flow, item, node, group))

    def ask(self, nodes: Sequence[str], item: Item, then: Callable[[], None]) -> list[bytes]:
        """Sends a note to other routers. The result is filled with the answers of those that take it; `then` is
        called when all have answered."""
        group = Group(len(nodes), False, False, lambda _group: then())
        for node in nodes:
            self._send(node, item, Sent(None, item, node, group))
        if not nodes:
            then()
        return group.contents

    def tell(self, node: str, note: bytes) -> None:
        """Sends a note of the strategy (`tidings.cluster.strategy.Context`)."""
        item = Item(("", ""), "", "", ("strategy", note), Mode.STRATEGY)
        sent = Sent(None, item, node, None)
        self._telling.add(sent)
        self._send(node, item, sent)

    def on_told(self, then: Callable[[], None]) -> None:
        """Calls `then` when the notes that are under way now have been taken."""
        self._telling.when_over(then)

    # --- what becomes of it ---

    def taken(self, sent: Sent, content: bytes = b"") -> None:
        """The receiver has dealt with it."""
        group = sent.group
        if group is not None:
            sent.item.takers += (sent.node,)
            group.contents.append(content)
            _release(group)
        else:
            _settled(sent.item)
        self._answered(sent)

    def again(self, taken: Sequence[Sent]) -> None:
        """A router has died that had taken these, and had not said that they are safe: they are sent another way,
        before what is sent behind them now. Whoever has had them knows them by their numbers."""
        flows: dict[int, Flow] = {}
        for sent in taken:
            item = sent.item
            item.missed = 0
            item.takers = tuple(node for node in item.takers if node != sent.node)
            if item.waiter is not None:
                if item.copies is not None:
                    item.copies.lost = True
                continue  # others are still asked, or it is under way again already
            assert sent.waiter is not None
            sent.waiter.expect()
            item.waiter = sent.waiter
            item.again = True
            item.source = ""  # who sent it here was told that it was taken: it is ours
            flow = self._open(item.flow)
            flow.returned.append(item)
            flows[id(flow)] = flow
        for flow in flows.values():
            self._settle(flow)

    def gives_way(self, item: Item) -> bool:
        """For who decides about an item, and has waited: whether something comes back by now that its sender has sent
        before (`again`). Then the item is decided about anew, behind that, and whoever asks MUST leave it at that."""
        flow = self._flows.get(item.flow)
        if flow is None or not flow.busy or not flow.returned:
            return False
        item.order = item.order or self._next()
        item.missed = 0
        item.put_back = True
        flow.returned.append(item)
        return True

    def refused(self, sent: Sent, version: int) -> None:
        """The receiver has not taken it; `version`: the view by which it is not the one that decides, or 0."""
        if sent.flow is not None:
            self.refusals += 1
            self._refusals.take(sent.node)
        self._returned(sent, version)

    def lost(self, sent: Sent) -> None:
        """The receiver is no more. Whether it had dealt with it cannot be known; it is sent another way."""
        if sent.group is not None:
            # A full JID has one session: who takes what is for it has had that.
            sent.group.lost = sent.group.lost or not sent.item.resource
            sent.item.missed = 0  # it has not been missed: who has its sessions next is asked for anew
        self._returned(sent, 0)

    def dropped(self, sent: Sent) -> None:
        """The link could not take it, and it can't wait: its sender gets an error."""
        group = sent.group
        if sent.flow is not None and not (group is not None and (group.taken or sent.item.takers)):
            self._port.overflowed(sent.item)
            if group is None:
                _settled(sent.item)
        if group is not None:
            group.taken = True
            _release(group)
        self._answered(sent)

    def relieved(self) -> None:
        """A link that was crowded is so no longer. Flows go on in turn: who got on comes to stand last, or those in
        front would always fill the link again."""
        for key, flow in list(self._flows.items()):
            waiting = len(flow.queue)
            self._settle(flow)
            if len(flow.queue) < waiting and self._flows.get(key) is flow:
                self._flows[key] = self._flows.pop(key)

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
        if sent.item.mode is Mode.STRATEGY:
            self._telling.over(sent)
        if flow is not None:
            flow.outstanding -= 1
        if group is not None:
            group.left -= 1
            if not group.left:
                group.done(group)
                _release(group)
                return
        if flow is not None:
            self._settle(flow)

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
        item.seen = refusals_seen
        if self._goes_behind(item):
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
        self._sources = frozenset(node.incarnation for node in view.living_routers())
        self._refusals.keep(self._sources)
        self._strategy.view_changed(view)
        early, self._early = self._early, {}
        for waiting in early.values():
            for item, version, seen in waiting:
                item.flow = item.flow[:2]
                self.incoming(item, version, seen)
        for flow in list(self._flows.values()):
            self._settle(flow)

    def doubt(self, doubts: dict[tuple[str, ...], Doubt]) -> None:
        """Flows of which a router has taken something that it has not made safe for long: it may stand still, and
        what it has taken may come back. Nothing goes past it until that is known."""
        before, self.doubts = self.doubts, doubts
        for key, doubt in before.items():
            if doubts.get(key) != doubt and (flow := self._flows.get(key)) is not None:
                self._settle(flow)

    def doubt_too(self, key: tuple[str, ...], doubt: Doubt) -> None:
        """One more, until `doubt` is called again."""
        self.doubts[key] = doubt

    def _is_doubtful(self, key: tuple[str, ...], plan: Plan) -> bool:
        """Whether something of a flow may come back from a router to which the plan does not go, or from one that is
        silent."""
        doubt = self.doubts.get(key)
        if doubt is None:
            return False
        return doubt.silent or (doubt.node != plan.decides and doubt.node not in plan.nodes)

    def give_up_waiting(self) -> None:
        """Called now and then: what came by a newer view and was waiting the last time goes back to who sent it."""
        for key in self._overdue & set(self._early):
            for item, _, _ in self._early.pop(key):
                if item.mode is not Mode.STRATEGY:  # who keeps what is told must not miss one
                    self._refuse(item)
        self._overdue = set(self._early)

    # --- within ---

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _open(self, key: tuple[str, ...]) -> Flow:
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(key)
            if len(key) == 2:
                self._senders[key[0]] = self._senders.get(key[0], 0) + 1
        return flow

    def _close(self, flow: Flow) -> None:
        del self._flows[flow.key]
        if len(flow.key) == 2:
            sender = flow.key[0]
            self._senders[sender] -= 1
            if not self._senders[sender]:
                del self._senders[sender]

    def _must_wait(self, flow: Flow | None, plan: Plan, missed: int = 0) -> bool:
        """What goes elsewhere, or (`missed`) where the table says, goes behind all the rest; nor is too much sent."""
        if flow is not None and (out := flow.outstanding) and (missed or plan != flow.plan or out >= MAX_OUTSTANDING):
            return True
        return bool(plan.decides or plan.nodes) and self._port.crowded(plan)

    def _send_decide(self, flow: Flow, item: Item, plan: Plan) -> None:
        flow.plan = plan
        flow.outstanding += 1
        item.order = item.order or self._next()
        self._send(plan.decides, item, Sent(flow, item, plan.decides, None))

    def _send(self, node: str, item: Item, sent: Sent) -> None:
        self.sent += 1
        self._port.send(node, item, sent, self._refusals.taken(node))

    def _hold(self, flow: Flow, item: Item, pending: Pending) -> None:
        """Lets the flow wait until an item is dealt with."""
        flow.busy += 1

        def done() -> None:
            flow.busy -= 1
            self._done(item)
            self._settle(flow)

        self._port.wait(pending, done)

    def _done(self, item: Item) -> None:
        """An item that came from another router has been dealt with, unless copies of it are still under way, or it
        waits again: who sent it keeps it until they are answered, and so does not let anything overtake it."""
        if item.copies is not None or item.put_back:
            return
        if not item.taken and item.mode is Mode.SESSIONS:
            self._refuse(item)
        else:
            self._finished(item)

    def _finished(self, item: Item) -> None:
        answer, item.answer = item.answer, None
        if answer is not None:
            answer(item)
        _settled(item)

    def _refuse(self, item: Item) -> None:
        if item.mode in (Mode.DECIDE, Mode.SESSIONS):
            self._refusals.give(item.source, item.flow, item.guess)
        item.taken = False
        self._finished(item)

    def _goes_behind(self, item: Item) -> bool:
        """Whether it comes behind one of its flow that was refused."""
        return item.mode in (Mode.DECIDE, Mode.SESSIONS) and self._refusals.goes_behind(
            item.source, item.flow, item.seen
        )

    def _settle(self, flow: Flow) -> None:
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
                if self._must_wait(flow, plan, item.missed) or (self.doubts and self._is_doubtful(flow.key, plan)):
                    return
            flow.queue.popleft()
            item.put_back = False
            if plan.decides or (item.source and self._goes_behind(item)):
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
                self._close(flow)


def _settled(item: Item) -> None:
    waiter, item.waiter = item.waiter, None
    if waiter is not None:
        waiter.settle()


def _release(group: Group) -> None:
    first, group.first = group.first, None
    if first is not None:
        first()
