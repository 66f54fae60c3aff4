"""A simulated cluster of routers: the real forwarding and a strategy in each, over a bad network, in simulated time.

`tidings.testing.strategies` plays scenarios in it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tidings.cluster.forwarding import Forwarder, Item, Mode, Pending, Sent
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import Factory, Plan
from tidings.cluster.view import ClusterView
from tidings.testing.simulated_link import RESEND, Link, Message

# Simulated seconds: the longest that a view may be late, and that the table of sessions takes to answer.
VIEW_LAG = 10.0
LOOK_UP = 0.05
# One message may be sent between routers so often; more would be a loop.
MOST_HOPS = 40


@dataclass(eq=False)
class Session:
    account: str
    resource: str
    # The first one of its full JID, the second one, …
    start: int = 1
    # What it has got: (sender, number); and the last number that it took from each sender, which moves with it.
    got: list[tuple[str, int]] = field(default_factory=list)
    taken: dict[str, int] = field(default_factory=dict)
    # On its way to another router: its client's stanzas wait at the connector.
    moving: bool = False


class LookUp:
    """A question to the table of sessions."""

    def __init__(self) -> None:
        self.is_over = False
        self._then: list[Callable[[], None]] = []

    def when_over(self, then: Callable[[], None]) -> None:
        if self.is_over:
            then()
        else:
            self._then.append(then)

    def end(self) -> None:
        self.is_over = True
        for then in self._then:
            then()


class World:
    """Time, the network, the shared table of sessions and the store."""

    def __init__(self, factory: Factory, seed: int) -> None:
        self.factory = factory
        self.random = random.Random(seed)  # noqa: S311 - a simulation
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.routers: dict[str, Router] = {}
        self.nodes: dict[str, Node] = {}
        self.version = 0
        # Full JID -> (router, session); the truth about who owns it.
        self.table: dict[str, tuple[str, Session]] = {}
        # By account, what waits for its next session.
        self.store: dict[str, list[Message]] = {}
        self.sessions: list[Session] = []
        self.sent: list[Message] = []
        # Messages whose router has crashed with them, or whose receiver's router has: no promise.
        self.excused: set[tuple[str, int]] = set()
        # Those for a session that had gone: they fall to its others, in no order with what those have had.
        self.fell: set[tuple[str, int]] = set()
        self.hops: dict[tuple[str, int], int] = {}
        # Messages that came twice to a session, which did not take them again; times that the table was asked.
        self.doubles = 0
        self.asked = 0
        self.notes = 0
        self.numbers: dict[str, int] = {}
        self.late_views = VIEW_LAG

    def later(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until

    # --- nodes ---

    def view(self) -> ClusterView:
        return ClusterView(self.version, self.nodes.values())

    def announce(self) -> None:
        """A new version of the view, which reaches each router at a time of its own."""
        self.version += 1
        view = self.view()
        for router in list(self.routers.values()):
            self.later(self.random.uniform(0, self.late_views), lambda router=router: router.learn(view))  # type: ignore[misc]

    def start(self, name: str) -> None:
        incarnation = f"{name}.{self.version}"
        self.nodes[name] = Node(name, incarnation, "127.0.0.1", 5777, ("router",), NodeState.UP)
        router = self.routers[incarnation] = Router(self, incarnation)
        self.version += 1
        # A router that joins gets the view that it has joined with.
        router.learn(self.view())
        self.version -= 1
        self.announce()

    def drain(self, name: str) -> None:
        node = self.nodes[name]
        self.nodes[name] = Node(name, node.incarnation, "127.0.0.1", 5777, ("router",), NodeState.DRAINING)
        self.announce()

    def stand_still(self, name: str, seconds: float) -> None:
        """A router does nothing for a while; its clients log in elsewhere. When it wakes it asks the table first."""
        router = self.routers[self.nodes[name].incarnation]
        router.still = True
        for jid, (owner, session) in list(self.table.items()):
            if owner == router.own and not session.moving:
                del self.table[jid]
                self._log_in_later(session, self.random.uniform(0, 2 * seconds))

        def wake() -> None:
            router.still = False
            for jid, session in list(router.here.items()):
                if self.table.get(jid) != (router.own, session):
                    router.close(session)

        self.later(seconds, wake)

    def gone(self, name: str, crash: bool) -> None:
        node = self.nodes.pop(name)
        router = self.routers.pop(node.incarnation)
        router.alive = False
        for jid, (owner, session) in list(self.table.items()):
            if owner == node.incarnation:
                del self.table[jid]
                session.moving = False
        if crash:
            router.crashed()
        self.announce()

    # --- clients ---

    def log_in(self, account: str, resource: str) -> None:
        """At a router of chance; the strategy may want it elsewhere."""
        before = [one for one in self.sessions if (one.account, one.resource) == (account, resource)]
        session = Session(account, resource, len(before) + 1)
        self.sessions.append(session)
        at = self.random.choice([r for r in self.routers.values() if r.serving and not r.still])
        keeper = self.routers.get(at.strategy.keeper(account))
        at = keeper if keeper is not None and not keeper.still else at
        self.table[f"{account}/{resource}"] = (at.own, session)
        at.open(session)
        for message in self.store.pop(account, ()):
            at.to_session(session, message)

    def log_out(self, jid: str) -> None:
        owner, session = self.table.pop(jid)
        self.routers[owner].close(session)

    def come_back(self, jid: str, after: float) -> None:
        """A client loses its stream, and logs in again, elsewhere."""
        if jid in self.table:
            session = self.table[jid][1]
            self.log_out(jid)
            self._log_in_later(session, after)

    def _log_in_later(self, before: Session, after: float) -> None:
        self.later(after, partial(self.log_in, before.account, before.resource))

    def keep(self, account: str, message: Message) -> None:
        """What nobody has taken is stored, and offered to whoever has come meanwhile."""
        there = [entry for entry in self.table.values() if entry[1].account == account]
        for owner, session in there:
            self.routers[owner].to_session(session, message)
        if not there:
            self.store.setdefault(account, []).append(message)

    def say(self, sender: str, to: str) -> None:
        """The session of a sender's full JID writes to a JID."""
        owner, session = self.table[sender]
        if session.moving or self.routers[owner].still:
            return
        name = f"{sender}#{session.start}"
        self.numbers[name] = number = self.numbers.get(name, 0) + 1
        message = Message(name, number, to)
        self.sent.append(message)
        self.routers[owner].say(message)


class Router:
    """One router: the real forwarding, the strategy, and the rules in their simplest form."""

    def __init__(self, world: World, own: str) -> None:
        self.world = world
        self.own = own
        self.alive = True
        self.still = False
        self.here: dict[str, Session] = {}
        # By full JID: sessions that stand still to be handed over, with what has come for them since; and those that
        # came from another router (which), with what has come here before that one gives what came there.
        self.frozen: dict[str, list[Message]] = {}
        self.early: dict[str, tuple[str, list[Message]]] = {}
        self.strategy = world.factory(own, self)
        self.forwarder = Forwarder(self.strategy, self)
        self.links: dict[str, Link] = {}
        self.heard: dict[str, int] = {}

    @property
    def serving(self) -> bool:
        node = self.forwarder.view.by_incarnation(self.own)
        return node is not None and node.state is NodeState.UP

    def puts_off(self, action: Callable[[], None]) -> bool:
        """Whether it stands still; then it does this later."""
        if self.still:
            self.world.later(RESEND, action)
        return self.still

    # --- what it hears ---

    def learn(self, view: ClusterView) -> None:
        if self.puts_off(lambda: self.learn(view)):
            return
        if not self.alive or view.version <= self.forwarder.view.version:
            return
        self.forwarder.view_changed(view)
        for node in [node for node in self.links if view.by_incarnation(node) is None]:
            self.links.pop(node).end()
        for jid, (giver, _) in list(self.early.items()):
            if view.by_incarnation(giver) is None:
                self._given(jid, [])
        for session in list(self.here.values()):
            self._place(session)

    # --- sessions that go from router to router ---

    def _place(self, session: Session) -> None:
        """A session that belongs elsewhere is handed over."""
        view = self.forwarder.view
        keeper = self.strategy.keeper(session.account) or self.own
        node = view.by_incarnation(self.own)
        if keeper == self.own and node is not None and node.state is NodeState.DRAINING:
            others = [other for other in view.with_service("router") if other.state is NodeState.UP]
            keeper = others[0].incarnation if others else self.own
        if keeper != self.own and not session.moving:
            session.moving = True
            self._soon(0.5, self._freeze, f"{session.account}/{session.resource}", keeper)

    def _soon(self, longest: float, step: Callable[..., None], jid: str, keeper: str) -> None:
        """Goes on with a move, if both are still there then."""

        def go_on() -> None:
            session = self.here.get(jid)
            if not self.puts_off(go_on) and self.alive and session is not None:
                step(jid, session, keeper)

        self.world.later(self.world.random.uniform(0.01, longest), go_on)

    def _freeze(self, jid: str, session: Session, keeper: str) -> None:
        if self.forwarder.under_way(session.account):
            # What it has sent is dealt with first, so that nothing which it sends from there overtakes.
            self._soon(0.05, self._freeze, jid, keeper)
        else:
            self.frozen[jid] = []
            self._soon(0.3, self._adopted, jid, keeper)

    def _adopted(self, jid: str, session: Session, keeper: str) -> None:
        """The keeper takes the session over, unless it is gone by now; its answer is under way for a while."""
        target = self.world.routers.get(keeper)
        if target is None:
            session.moving = False
            for message in self.frozen.pop(jid):
                self._give(session, message)
            return
        self.world.table[jid] = (keeper, session)
        target.early[jid] = (self.own, [])
        target.open(session)
        self._soon(0.3, self._moved, jid, keeper)

    def _moved(self, jid: str, session: Session, keeper: str) -> None:
        """It is the keeper's, which gets what came here meanwhile."""
        frozen = self.frozen.pop(jid)
        self.close(session)
        note = Item(("", session.account), session.account, "", ("given", (jid, frozen)), Mode.NOTE)
        taken = self.forwarder.ask((keeper,), note, lambda: None if taken else self._send_on(frozen))

    def _given(self, jid: str, messages: list[Message]) -> bool:
        """The router that had the session has given all; False when it has ended here."""
        _, early = self.early.pop(jid, ("", None))
        if early is None:
            return False
        session = self.here[jid]
        session.moving = False
        for message in sorted([*messages, *early], key=lambda message: message.number):
            self._give(session, message)
        self._place(session)
        return True

    def _send_on(self, messages: list[Message]) -> None:
        """What waited for a session that is no more."""
        for message in messages:
            self.say(message)

    # --- sessions ---

    def open(self, session: Session) -> None:
        self.here[f"{session.account}/{session.resource}"] = session
        self.strategy.session_opened(session.account, session.resource)
        self._place(session)

    def close(self, session: Session) -> None:
        jid = f"{session.account}/{session.resource}"
        self.here.pop(jid, None)
        self.strategy.session_closed(session.account, session.resource)
        self._send_on([*self.frozen.pop(jid, ()), *self.early.pop(jid, ("", []))[1]])

    def crashed(self) -> None:
        """What it had taken and not given on is lost, and so is what its own sessions had sent through it."""
        waiting = [*self.frozen.values(), *(early for _, early in self.early.values())]
        waiting += [link.unanswered() for link in self.links.values()]
        self.world.excused.update((message.sender, message.number) for messages in waiting for message in messages)
        for message in self.world.sent:
            if message.sender.partition("#")[0] in self.here:
                self.world.excused.add((message.sender, message.number))

    # --- stanzas ---

    def say(self, message: Message) -> None:
        account, _, resource = message.to.partition("/")
        item = Item((message.sender.partition("/")[0], account), account, resource, message)
        pending = self.forwarder.run(item)
        if pending is not None:
            self.forwarder.hold(item, pending)

    def decide(self, item: Item, plan: Plan) -> Pending:
        if item.mode is Mode.NOTE:
            item.taken = self._given(*item.payload[1])
            return None
        if item.missed:
            return self._look_up(item)
        message: Message = item.payload
        receivers = self._matching(item)
        for session in receivers:
            self.to_session(session, message)
        if item.mode is Mode.SESSIONS:
            item.taken = bool(receivers)
            return None
        if plan.nodes:
            self.forwarder.copies(item, plan, bool(receivers))
        elif not receivers:
            return self._look_up(item)
        return None

    def _look_up(self, item: Item) -> Pending:
        """Nobody took it: the table says whether somebody could."""
        question = LookUp()

        def answer() -> None:
            if self.puts_off(answer):
                return
            rest = self._looked_up(item) if self.alive else None
            if rest is None:
                question.end()
            else:
                rest.when_over(question.end)

        self.world.later(self.world.random.uniform(0, LOOK_UP), answer)
        return question

    def _looked_up(self, item: Item) -> Pending:
        table = self.world.table
        name = f"{item.account}/{item.resource}"
        where = {table[jid][0] for jid in table if jid == name or (not item.resource and jid.startswith(name))}
        elsewhere = tuple(sorted(where - {self.own}))
        self.world.asked += bool(elsewhere)
        if item.missed < 2 and elsewhere:
            item.missed = 2
            self.forwarder.copies(item, Plan(nodes=elsewhere, certain=False), False)
        elif item.missed < 2 and (receivers := self._matching(item)):
            for session in receivers:
                self.to_session(session, item.payload)
        elif item.resource:
            # As if it were for the account (RFC 6121 8.5.3.2.1).
            item.resource, item.missed = "", 0
            self.world.fell.add((item.payload.sender, item.payload.number))
            return self.decide(item, self.strategy.locate(item.account, ""))
        else:
            self.world.keep(item.account, item.payload)
        return None

    def _matching(self, item: Item) -> list[Session]:
        if item.resource:
            match = self.here.get(f"{item.account}/{item.resource}")
            return [match] if match else []
        return [session for session in self.here.values() if session.account == item.account]

    def to_session(self, session: Session, message: Message) -> None:
        jid = f"{session.account}/{session.resource}"
        if jid in self.early:
            self.early[jid][1].append(message)
        elif jid in self.frozen:
            self.frozen[jid].append(message)
        else:
            self._give(session, message)

    def _give(self, session: Session, message: Message) -> None:
        if message.number <= session.taken.get(message.sender, 0):
            self.world.doubles += 1
            name = (message.sender, message.number)
            if name in self.world.fell and message.to != f"{session.account}/{session.resource}":
                self.world.excused.add(name)
            return
        session.taken[message.sender] = message.number
        session.got.append((message.sender, message.number))

    # --- the port of the forwarder and the context of the strategy ---

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        if item.mode is Mode.STRATEGY:
            self.world.notes += 1
        elif item.mode is not Mode.NOTE:
            name = (item.payload.sender, item.payload.number)
            self.world.hops[name] = self.world.hops.get(name, 0) + 1
            assert self.world.hops[name] <= MOST_HOPS, f"{name} goes round and round"
        link = self.links.get(node)
        if link is None:
            link = self.links[node] = Link(self, node)
        link.send(item, sent, self.forwarder.view.version, refusals_seen)

    def crowded(self, plan: Plan) -> bool:
        return False

    def wait(self, pending: Pending, then: Callable[[], None]) -> None:
        pending.when_over(then)

    def overflowed(self, item: Item) -> None:
        self.world.keep(item.account, item.payload)

    def tell(self, node: str, note: bytes) -> None:
        self.forwarder.tell(node, note)

    def sessions(self) -> list[str]:
        return list(self.here)
