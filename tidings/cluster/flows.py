"""What the forwarding of stanzas is made of: items, flows, and the port to the router. Pure; see `forwarding`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from tidings.cluster.strategy import HERE, Plan


class Mode(IntEnum):
    """What the receiver does with it. The values are those of common.v1.Forwarding."""

    DECIDE = 1
    SESSIONS = 2
    NOTE = 3
    STRATEGY = 4


# What is no stanza.
NOTES = (Mode.NOTE, Mode.STRATEGY)


class Waiter(Protocol):
    """Who wants to know when a stanza is safe: when all has happened that was expected."""

    def expect(self) -> None:
        """One thing more must happen."""

    def settle(self) -> None:
        """One of them has."""


class Doubt(NamedTuple):
    """Of a flow: the router that has taken something, and not made it safe for long; and whether it is silent."""

    node: str
    silent: bool = False


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
    # One of several routers is asked, of which it is not known who takes it; who does not, holds nothing up.
    guess: bool = False
    # How often nobody took it.
    missed: int = 0
    # It comes from a router that has died: sessions that were there may be others' by now, or will be.
    again: bool = False
    # Whoever was deciding about it has put it back, behind what comes back itself (`Forwarder.gives_way`).
    put_back: bool = False
    # It was looked whether the sessions that it may be for are still here.
    checked: bool = False
    # How many refusals of this router its sender had seen when it sent it.
    seen: int = 0
    # Said by who deals with it, when it came from another router: whether somebody took it, and an answer.
    taken: bool = True
    # Its copies that are under way: it is dealt with when they are answered. And the routers that have taken one.
    copies: Group | None = None
    takers: tuple[str, ...] = ()
    content: bytes = b""
    # Tells its source; None when it came from this router.
    answer: Callable[[Item], None] | None = None
    order: int = 0
    # Who waits until it is safe, if anybody does. It has expected that the item is dealt with.
    waiter: Waiter | None = None


# What dealing with an item returns: None when it is done, or something to wait for.
Pending = Any


class Port(Protocol):
    """The router, as its forwarding sees it."""

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        """Puts an item on the link to a router. Later exactly one of `taken`, `refused` and `lost` of the
        forwarder MUST be called for it, in the order of the receiver's answers. Where somebody waits until it is safe
        (`waiter` of what was sent), that one is told when the receiver says so, or has given it back; when the
        receiver dies before, `again` MUST be called for what it had taken."""

    def crowded(self, plan: Plan) -> bool:
        """Whether a link that a plan needs has so much waiting that nothing more should be put on it. When that is
        over, `relieved` of the forwarder MUST be called."""

    def decide(self, item: Item, plan: Plan) -> Pending:
        """Applies the rules of the account, or does what the item's mode says."""

    def wait(self, pending: Pending, then: Callable[[], None]) -> None:
        """Calls `then` when it is done, also when it has failed."""

    def overflowed(self, item: Item) -> None:
        """The item can't wait any longer: its sender gets an error."""


class Sent:
    """An item that a link carries, till its receiver has said what became of it."""

    __slots__ = ("flow", "group", "item", "node", "size", "waiter")

    def __init__(self, flow: Flow | None, item: Item, node: str, group: Group | None) -> None:
        self.flow = flow
        self.item = item
        self.node = node
        self.group = group
        # Expects that the receiver says that it is safe there, or that it comes back.
        self.waiter = item.waiter
        # Bytes that count as waiting for that.
        self.size = 0


class Group:
    """The copies of one item; `done` is told when all are answered."""

    __slots__ = ("certain", "contents", "done", "first", "left", "lost", "taken")

    def __init__(self, left: int, certain: bool, taken: bool, done: Callable[[Group], None]) -> None:
        self.left = left
        self.certain = certain
        # By whoever has them sent.
        self.taken = taken
        # A router that got one has died: its sessions are another one's by now, or will be.
        self.lost = False
        self.contents: list[bytes] = []
        self.done = done
        # Told once, when the first one has taken it, or all have answered.
        self.first: Callable[[], None] | None = None


class Flow:
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
