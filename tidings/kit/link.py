"""Links: long-lived gRPC streams that carry batches.

A message on a gRPC stream costs some 200 µs on either side, whatever is in it; a stanza more in a batch
costs 2 to 9 µs. So an `Outbox` collects what is to be sent: an idle link sends at the next tick, a busy one
at most one batch per `interval`. Within a process there is no such cost and the interval is 0: one batch a
tick.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import grpc

from tidings.api.common.v1.error_pb2 import ErrorDetail
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import Node
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import describe, error_detail
from tidings.kit.tasks import is_cancelled

log = get_logger("server")

# A batch beyond either is closed and the next one begun (DESIGN 6): it keeps one message well under gRPC's
# 4 MiB, and one link from holding a process's loop for long.
MAX_ENVELOPES = 512
MAX_BYTES = 1 << 20

# Seconds between two batches on a link that leaves the process.
INTERVAL = 0.001
# Seconds for the last write of a call that ends.
LAST_WRITE = 1.0

# Waits shorter than this are not worth a timer.
SHORTEST_WAIT = 0.0002

# Closed batches that may wait for the stream, and bytes in them. A peer that takes none of them is as good as
# dead. Beyond either `Overflow` is raised, and the link's owner ends the link.
MAX_WAITING = 256
MAX_WAITING_BYTES = 64 << 20
# From so much on whoever can hold its own sources back does so, until it is half of that. A stanza of 200 bytes takes
# some 3 KiB on its way, and what many sources add within one turn of the loop holds up everything else.
CONGESTED = 4
# The same for links whose sources are bounded otherwise, so that they are not held up for a moment's sake.
PATIENT = 32
# Sent batches of a resumable link that its peer has not confirmed; with so many, those that follow wait.
MAX_UNCONFIRMED = 128
# Seconds that a confirmation may wait for company.
CONFIRM_DELAY = 0.05


class Batch(Protocol):
    """What the request and response messages of all links have in common."""

    sequence: int
    received_through: int
    safe_through: int


B = TypeVar("B", bound=Batch)


class Overflow(Exception):
    """The peer of a link does not take what is sent; the link must be ended."""


class Gap(Exception):
    """A batch is missing: the call must be ended, and the link resumed by another one."""


class Outbox(Generic[B]):
    """What waits to be sent on one link.

    Its bounds are MAX_WAITING closed batches and MAX_WAITING_BYTES; beyond either `begin` and `begin_item` raise
    Overflow. Long before `congested` is true: whoever can hold back its own sources does so then. An
    outbox of answers has no bound of its own: who asks is bounded.

    A resumable link outlives its calls: what the peer has not confirmed is kept, and sent again by the next
    call (`resume`). Then `run` is started once for each call.
    """

    __slots__ = (
        "_awaited",
        "_bounded",
        "_bytes",
        "_confirm",
        "_confirming",
        "_count",
        "_ended",
        "_interval",
        "_most",
        "_new",
        "_resend",
        "_resumable",
        "_unconfirmed",
        "_waiter",
        "_waiting",
        "_waiting_bytes",
        "batch",
        "confirmed_through",
        "on_batch",
        "on_relief",
        "received",
        "relieving",
        "safe",
        "sent_bytes",
        "sent_envelopes",
        "sequence",
    )  # fmt: skip

    def __init__(
        self,
        new: Callable[[], B],
        interval: float,
        resumable: bool = False,
        bounded: bool = True,
        most: int = CONGESTED,
    ) -> None:
        """`most`: batches that may wait before it is congested."""
        self._most = most
        self._resumable = resumable
        self._bounded = bounded
        # Sent and not confirmed, and those of them that the present call has to send again.
        self._unconfirmed: deque[B] = deque()
        self._resend: deque[B] = deque()
        self._confirming: asyncio.TimerHandle | None = None
        # The peer is to be told what was taken, by a batch of its own if no other one goes.
        self._confirm = False
        # The last batch that the peer has confirmed.
        self.confirmed_through = 0
        # What waits until the peer has confirmed a batch, with its number.
        self._awaited: deque[tuple[int, Callable[[], None]]] = deque()
        # Called with each batch when it has got its number.
        self.on_batch: Callable[[B], None] | None = None
        self._new = new
        self._interval = interval
        self._waiting: deque[tuple[B, int, int]] = deque()
        self._waiting_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._count = 0
        self._bytes = 0
        self._ended = False
        # The batch that is being filled.
        self.batch: B = new()
        # The number of the last batch sent, and of the last one taken from the peer.
        self.sequence = 0
        self.received = 0
        # The last one taken from the peer whose envelopes are dealt with.
        self.safe = 0
        # Totals, for metrics.
        self.sent_envelopes = 0
        self.sent_bytes = 0
        # Called once when the outbox is no longer congested, after it was.
        self.on_relief: Callable[[], None] | None = None
        self.relieving = False

    def begin(self, size: int) -> Any:
        """Makes room for an envelope of `size` bytes; returns the container to `add` it to."""
        self._make_room(size)
        envelopes: Any = self.batch
        return envelopes.envelopes

    def _make_room(self, size: int) -> None:
        if self._count >= MAX_ENVELOPES or self._bytes + size > MAX_BYTES:
            self._close()
        self._count += 1
        self._bytes += size
        if self._waiter is not None:
            self._wake()

    def begin_item(self) -> B:
        """Makes room for something that is no envelope; returns the batch to put it into."""
        self._make_room(64)
        return self.batch

    @property
    def congested(self) -> bool:
        return max(len(self._waiting), self._waiting_bytes // MAX_BYTES) > self._most

    @property
    def _is_relieved(self) -> bool:
        return max(len(self._waiting), self._waiting_bytes // MAX_BYTES) <= self._most // 2

    def _close(self) -> None:
        if not self._count:
            return
        if self._bounded and (len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES):
            raise Overflow(f"{len(self._waiting)} batches wait for a peer that does not take them")
        # What is dealt with by now has its answers in this batch or before it; what comes later may not.
        self.batch.safe_through = self.safe
        self._waiting.append((self.batch, self._count, self._bytes))
        self._waiting_bytes += self._bytes
        if self.congested:
            self.relieving = True
        self.batch = self._new()
        self._count = self._bytes = 0

    def end(self) -> None:
        """Makes `run` return when the batch that is being written is out: gRPC can't end a call in the midst of a
        write, and would leave its peer waiting."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # --- resumable links ---

    def confirm_soon(self) -> None:
        """Tells the peer before long what was taken, if nothing else does it earlier."""
        if self._confirming is None:
            self._confirming = asyncio.get_running_loop().call_later(CONFIRM_DELAY, self._confirm_now)

    def _confirm_now(self) -> None:
        self._confirming = None
        self.confirm_at_once()

    def confirmed(self, through: int) -> None:
        """The peer has taken all batches up to this number."""
        self.confirmed_through = max(self.confirmed_through, through)
        while self._unconfirmed and self._unconfirmed[0].sequence <= through:
            self._unconfirmed.popleft()
            if len(self._unconfirmed) == MAX_UNCONFIRMED - 1:
                self._wake()
        while self._awaited and self._awaited[0][0] <= through:
            self._awaited.popleft()[1]()

    def when_confirmed(self, then: Callable[[], None]) -> None:
        """Calls `then` when the peer has what was put in last; in order."""
        last = self.sequence + len(self._waiting) + (1 if self._count else 0)
        if last <= self.confirmed_through:
            then()
        else:
            self._awaited.append((last, then))

    def release(self) -> None:
        """The link is over: nothing waits for the peer any more."""
        while self._awaited:
            self._awaited.popleft()[1]()

    def confirm_at_once(self) -> None:
        """Tells the peer what was taken with the next batch, which goes at the next tick."""
        self._confirm = True
        self._wake()

    def resume(self, after: int) -> None:
        """Another call begins: batches behind this number are sent again, first."""
        self._ended = False
        self.confirmed(after)
        self._resend = deque(self._unconfirmed)
        self.confirm_soon()

    def take(self, sequence: int) -> bool:
        """Whether a batch of the peer is new; one without a number only confirms. Raises Gap."""
        if sequence <= self.received:
            return False
        if sequence != self.received + 1:
            raise Gap(f"batch {sequence} came after {self.received}")
        self.received = sequence
        return True

    def _full(self) -> bool:
        return self._resumable and len(self._unconfirmed) >= MAX_UNCONFIRMED

    async def run(self, write: Callable[[B], Awaitable[Any]]) -> None:
        """Sends batches by `write` until cancelled, or until the stream is over."""
        loop = asyncio.get_running_loop()
        last = 0.0
        while not self._ended:
            if self._resend:
                again = self._resend.popleft()
                again.received_through = self.received
                if not await self._write(write, again):
                    return
                continue
            if self._confirm and (self._full() or not (self._count or self._waiting)):
                if not await self._write(write, self._confirmation()):
                    return
                continue
            if (not self._count and not self._waiting) or self._full():
                self._waiter = loop.create_future()
                await self._waiter
                continue
            if self._interval:
                wait = last + self._interval - loop.time()
                if wait > SHORTEST_WAIT:
                    await asyncio.sleep(wait)
                last = loop.time()
            if self._waiting:
                batch, count, size = self._waiting.popleft()
                self._waiting_bytes -= size
                if self.relieving and self._is_relieved:
                    self.relieving = False
                    if self.on_relief is not None:
                        self.on_relief()
            else:
                batch, count, size = self.batch, self._count, self._bytes
                batch.safe_through = self.safe
                self.batch = self._new()
                self._count = self._bytes = 0
            self.sequence += 1
            self._confirm = False
            batch.sequence = self.sequence
            batch.received_through = self.received
            self.sent_bytes += size
            self.sent_envelopes += count
            if self._resumable:
                self._unconfirmed.append(batch)
                if self.on_batch is not None:
                    self.on_batch(batch)
            if not await self._write(write, batch):
                return

    def _confirmation(self) -> B:
        """A batch without a number and content: it may go while the peer has to confirm others first."""
        self._confirm = False
        batch = self._new()
        batch.received_through = self.received
        if not self._count and not self._waiting:
            batch.safe_through = self.safe
        return batch

    async def _write(self, write: Callable[[B], Awaitable[Any]], batch: B) -> bool:
        """False when the stream is over: who reads it sees why."""
        try:
            await write(batch)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            return False
        return True


class Membership(Protocol):
    """Who is told what calls say of nodes (`tidings.kit.membership.Member`)."""

    def reaches(self, node: Node) -> None:
        """It has answered."""

    def report(self, node: Node, observation: str) -> None:
        """It has not, and may be gone."""


async def why_ended(call: Awaitable[None], node: Node, member: Membership) -> tuple[str, ErrorDetail | None]:
    """Carries out one call of a link to a node: why it ended, for people, and the node's own reason if it gave one.
    Who refuses has answered, and is reached: one that has joined does not serve at once."""
    try:
        await call
    except grpc.RpcError as error:
        why, refusal = describe(error), error_detail(error)
        if refusal is None:
            member.report(node, why)
        else:
            member.reaches(node)
        return why, refusal
    except Gap as error:
        return str(error), None
    except (TimeoutError, OSError) as error:
        why = str(error) or "no answer"
        member.report(node, why)
        return why, None
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        return "this side has ended the call", None
    return "the call ended", None


def in_order(envelopes: Any, items: Any) -> Iterator[Envelope | Any]:
    """Envelopes and the items that stand between them (each has a `position`), as they were sent."""
    taken = 0
    for item in items:
        while taken < item.position and taken < len(envelopes):
            yield envelopes[taken]
            taken += 1
        yield item
    for index in range(taken, len(envelopes)):
        yield envelopes[index]


class Lane:
    """Runs steps one after the other: at once while nothing waits, else behind what waits.

    A step that returns an awaitable holds up those behind it until that is done; errors are the step's own
    business. The queue is bounded by the caller's flow control: `on_long` is called when HIGH steps wait,
    `on_short` when the lane is empty again.
    """

    HIGH = 64

    __slots__ = ("_idle", "_long", "_spawn", "on_long", "on_short", "waiting")

    def __init__(self, spawn: Callable[[Any, str], Any]) -> None:
        self._spawn = spawn
        self.waiting: deque[tuple[Callable[..., Awaitable[None] | None], tuple[Any, ...]]] | None = None
        self.on_long: Callable[[], None] | None = None
        self.on_short: Callable[[], None] | None = None
        self._long = False
        self._idle: asyncio.Future[None] | None = None

    async def idle(self) -> None:
        """Waits until nothing is under way."""
        while self.waiting is not None:
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    def run(self, step: Callable[..., Awaitable[None] | None], *args: Any) -> None:
        if self.waiting is not None:
            self.waiting.append((step, args))
            if len(self.waiting) >= self.HIGH:
                self.press()
            return
        result = step(*args)
        if result is not None:
            self.hold(result)

    def press(self) -> None:
        """Has whoever fills the lane hold back, until it is empty again."""
        if not self._long:
            self._long = True
            if self.on_long is not None:
                self.on_long()

    def hold(self, result: Awaitable[None]) -> None:
        """Lets what comes next wait for `result`, of a step that the caller has run itself."""
        self.waiting = deque()
        self._spawn(self._drain(result), "lane")

    async def _drain(self, result: Awaitable[None]) -> None:
        waiting = self.waiting
        assert waiting is not None
        following: Awaitable[None] | None = result
        while True:
            try:
                if following is not None:
                    await following
                if not waiting:
                    break
                step, args = waiting.popleft()
                following = step(*args)
            except Exception:
                # Errors are the steps' own business; one that was not foreseen must not hold up those behind it.
                log.exception("step_failed")
                following = None
        self.waiting = None
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None
        if self._long:
            self._long = False
            if self.on_short is not None:
                self.on_short()
