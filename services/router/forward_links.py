"""The links between routers (router.v1 Forward): what one forwards, and what the other answers.

Each router opens one link to each other one and sends on it; what comes back are answers. A link outlives its
calls: it ends when the other router's incarnation has left the view.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import grpc

from services.router.message_queue import MESSAGE_BYTES
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import ForwardHello, ForwardRequest, ForwardResponse
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.flows import Doubt
from tidings.cluster.forwarding import Forwarder, Item, Mode, Sent
from tidings.cluster.node import Node
from tidings.cluster.strategy import Plan
from tidings.cluster.view import ClusterView
from tidings.kit.link import INTERVAL, PATIENT, Outbox, Overflow, why_ended
from tidings.kit.logging import get_logger
from tidings.kit.module import MESSAGE
from tidings.kit.tasks import Tasks

if TYPE_CHECKING:
    from tidings.kit.channel import Channels
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Seconds for a router to answer the first request, and between two tries to reach it.
WELCOME_TIMEOUT = 5.0
RETRY = 0.2

# Seconds after which messages that are safe are told of though others of their batch are not.
EARLY = 0.05

# Seconds after which what another router has taken should be safe, and between two looks at what is not; and how much
# of that is looked at: while the database is away it is all of it, and no flow goes another way than before.
SLOW = 0.15
LOOK = 0.05
MOST_SLOW = 5000

NOTES = (Mode.NOTE, Mode.STRATEGY)


class OutgoingLink:
    """What this router sends to another one."""

    def __init__(self, node: Node, forwarder: Forwarder) -> None:
        self.node = node
        self._forwarder = forwarder
        self.outbox: Outbox[ForwardRequest] = Outbox(ForwardRequest, INTERVAL, resumable=True, most=PATIENT)
        self.outbox.on_batch = self._numbered
        self.outbox.on_relief = self._relieved
        # The other router has answered a call; and it has answered the last one, and that has not ended.
        self.welcomed = False
        self.up = False
        # Notes of the strategy that found no room: they must not be lost.
        self._postponed: deque[tuple[Item, Sent]] = deque()
        # What is in no numbered batch yet; then by batch; and what is being dealt with for longer.
        self._unnumbered: deque[Sent] = deque()
        self._batches: dict[int, list[Sent | None]] = {}
        self._sent_at: dict[int, float] = {}
        self._later: dict[tuple[int, int], Sent] = {}
        # By batch and place in it, what was taken and is not known to be safe; and the bytes of all that somebody
        # waits for.
        self._unsafe: dict[int, dict[int, Sent]] = {}
        self._taken_at: dict[int, float] = {}
        self.unsafe_bytes = 0
        # Keeps it up.
        self.task: asyncio.Task[Any] | None = None

    def send(self, item: Item, sent: Sent, refusals_seen: int) -> None:
        """Raises Overflow when the other router has not taken anything for long."""
        if item.mode is Mode.STRATEGY and (self._postponed or self.outbox.congested):
            self._postponed.append((item, sent))
            return
        if item.mode in NOTES:
            self._note(item, sent)
            return
        source: Envelope = item.payload
        envelopes = self.outbox.begin(len(source.stanza) + 128)
        envelopes.append(source)
        envelope = envelopes[-1]
        envelope.forwarding = int(item.mode)
        envelope.refusals_seen = refusals_seen
        envelope.view_version = self._forwarder.view.version
        envelope.hops = source.hops + 1
        if sent.group is not None:
            envelope.prompt = not sent.group.certain
        if not envelope.to_jid or (sent.group is not None and not item.resource):
            # Sent without `to`, which means the account (RFC 6120 10.3); or to a full JID that is gone, and treated
            # as if to the account (RFC 6121 8.5.3.2.1).
            envelope.to_jid = f"{item.account}/{item.resource}" if item.resource else item.account
        if sent.waiter is not None:
            sent.waiter.expect()
            sent.size = len(source.stanza) + MESSAGE_BYTES
            self.unsafe_bytes += sent.size
        self._unnumbered.append(sent)

    def _note(self, item: Item, sent: Sent) -> None:
        name, content = item.payload
        self.outbox.begin(len(content)).add(
            forwarding=int(item.mode), to_jid=item.account, children=(name,), stanza=content, prompt=True
        )
        self._unnumbered.append(sent)

    def _relieved(self) -> None:
        while self._postponed and not self.outbox.congested:
            self._note(*self._postponed.popleft())
        self._forwarder.relieved()

    def _numbered(self, batch: ForwardRequest) -> None:
        self._batches[batch.sequence] = [self._unnumbered.popleft() for _ in batch.envelopes]
        self._sent_at[batch.sequence] = time.monotonic()

    def receive(self, response: ForwardResponse) -> None:
        """Takes the answers. Raises Gap."""
        self.outbox.confirmed(response.received_through)
        if response.sequence and not self.outbox.take(response.sequence):
            return
        for answer in response.answers:
            if answer.safe:
                continue
            key = (answer.sequence, answer.index)
            batch = self._batches.get(answer.sequence)
            sent = self._later.pop(key, None)
            if sent is None and batch is not None:
                sent, batch[answer.index] = batch[answer.index], None
            if sent is None:
                continue
            if answer.later:
                self._later[key] = sent
            elif answer.refused:
                log.debug("refused", by=self.node.hostname, to=sent.item.account, view=answer.view_version)
                self._forwarder.refused(sent, answer.view_version)
                self._settle(sent)
            else:
                self._taken(key, sent, answer.content)
        for sequence in [number for number in self._batches if number <= response.safe_through]:
            del self._sent_at[sequence]
            for index, taken in enumerate(self._batches.pop(sequence)):
                if taken is not None:
                    self._taken((sequence, index), taken, b"")
        for answer in response.answers:
            if answer.safe and (sent := self._unsafe.get(answer.sequence, {}).pop(answer.index, None)) is not None:
                self._settle(sent)
        for sequence in response.safe:
            self._taken_at.pop(sequence, None)
            for sent in self._unsafe.pop(sequence, {}).values():
                self._settle(sent)
        if response.answers:
            self.outbox.confirm_soon()

    def _taken(self, place: tuple[int, int], sent: Sent, content: bytes) -> None:
        if sent.waiter is not None:
            batch = self._unsafe.get(place[0])
            if batch is None:
                batch = self._unsafe[place[0]] = {}
                self._taken_at[place[0]] = time.monotonic()
            batch[place[1]] = sent
        self._forwarder.taken(sent, content)

    def is_silent(self, moment: float) -> bool:
        """Whether what was sent before a moment of the monotonic clock is not answered."""
        return next(iter(self._sent_at.values()), moment) < moment

    def unsafe_since(self, moment: float) -> Iterator[tuple[str, ...]]:
        """The flows of what was taken before a moment of the monotonic clock and is not known to be safe."""
        for sequence, taken_at in self._taken_at.items():
            if taken_at > moment:
                return
            for sent in self._unsafe[sequence].values():
                yield sent.item.flow

    def _settle(self, sent: Sent) -> None:
        if sent.waiter is not None:
            self.unsafe_bytes -= sent.size
            sent.waiter.settle()

    def lost(self) -> None:
        """The other router is no more: everything unanswered comes back, and what it has not said to be safe."""
        self.outbox.on_batch = None
        if self.task is not None:
            self.task.cancel()
        unanswered = [sent for batch in self._batches.values() for sent in batch if sent is not None]
        unanswered += [*self._later.values(), *self._unnumbered, *(sent for _, sent in self._postponed)]
        self._batches.clear()
        self._sent_at.clear()
        self._later.clear()
        self._unnumbered.clear()
        self._postponed.clear()
        unsafe = [sent for batch in self._unsafe.values() for sent in batch.values()]
        self._unsafe.clear()
        self._taken_at.clear()
        self._forwarder.again(unsafe)
        for sent in unsafe:
            self._settle(sent)
        for sent in unanswered:
            self._forwarder.lost(sent)
            self._settle(sent)


class _Batch:
    """A batch of another router with messages that somebody there waits for."""

    __slots__ = ("_early", "_left", "_link", "_sequence")

    def __init__(self, link: IncomingLink, sequence: int) -> None:
        self._link = link
        self._sequence = sequence
        # Messages that are not safe; and the batch itself, while it is being taken.
        self._left = 1
        # Those that are safe before others.
        self._early: list[int] = []

    def message(self, index: int) -> _Message:
        self._left += 1
        return _Message(self, index)

    def settle(self, index: int = -1) -> None:
        self._left -= 1
        if not self._left:
            self._link.outbox.begin_item().safe.append(self._sequence)
        elif index >= 0:
            if not self._early:
                # Mostly all of them are written together.
                asyncio.get_running_loop().call_later(EARLY, self._tell)
            self._early.append(index)

    def _tell(self) -> None:
        early, self._early = self._early, []
        if self._left:
            batch = self._link.outbox.begin_item()
            for index in early:
                batch.answers.add(sequence=self._sequence, index=index, safe=True)


class _Message:
    """One of its messages: a waiter (`tidings.cluster.flows.Waiter`)."""

    __slots__ = ("_batch", "_index", "_left")

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch = batch
        self._index = index
        # It is being dealt with.
        self._left = 1

    def expect(self) -> None:
        self._left += 1

    def settle(self) -> None:
        self._left -= 1
        if not self._left:
            self._batch.settle(self._index)


class IncomingLink:
    """What another router sends to this one."""

    def __init__(self, incarnation: str, forwarder: Forwarder) -> None:
        self.incarnation = incarnation
        self._forwarder = forwarder
        self.outbox: Outbox[ForwardResponse] = Outbox(ForwardResponse, INTERVAL, resumable=True, bounded=False)
        # The call that serves it now.
        self.handling: asyncio.Task[Any] | None = None

    def receive(self, request: ForwardRequest) -> None:
        """Takes a batch; what can be dealt with at once is, the rest is answered later. Raises Gap."""
        outbox = self.outbox
        outbox.confirmed(request.received_through)
        sequence = request.sequence
        if not sequence:
            return
        if outbox.take(sequence):
            batch = _Batch(self, sequence)
            for index, envelope in enumerate(request.envelopes):
                try:
                    self._take(sequence, index, envelope, batch)
                except Exception:
                    # It must not take those behind it along: of a batch that was taken none may be forgotten.
                    log.exception("forwarded_item_failed", router=self.incarnation, forwarding=envelope.forwarding)
                    outbox.begin_item().answers.add(sequence=sequence, index=index, refused=True)
            outbox.safe = sequence
            batch.settle()
        outbox.confirm_soon()

    def _take(self, sequence: int, index: int, envelope: Envelope, batch: _Batch) -> None:
        account, _, resource = envelope.to_jid.partition("/")
        mode = Mode(envelope.forwarding)
        item = Item(
            (envelope.from_jid.partition("/")[0], account), account, resource,
            (envelope.children[0], envelope.stanza) if mode in NOTES else envelope,
            mode, source=self.incarnation, answer=partial(self._answered, sequence, index, envelope.prompt),
        )  # fmt: skip
        if envelope.kind == MESSAGE and envelope.number and mode not in NOTES:
            item.waiter = batch.message(index)
        self._forwarder.incoming(item, envelope.view_version, envelope.refusals_seen)
        if item.answer is not None:
            self.outbox.begin_item().answers.add(sequence=sequence, index=index, later=True)
            item.answer = partial(self._answered, sequence, index, True)

    def _answered(self, sequence: int, index: int, prompt: bool, item: Item) -> None:
        if item.taken and not prompt and not item.content:
            return
        answer = self.outbox.begin_item().answers.add(sequence=sequence, index=index)
        answer.content = item.content
        if not item.taken:
            answer.refused = True
            if item.mode is Mode.DECIDE:
                answer.view_version = self._forwarder.view.version


class ForwardLinks:
    """All links of one router."""

    def __init__(self, own: Node, channels: Channels, tasks: Tasks, member: Member) -> None:
        self._own = own
        self._channels = channels
        self._tasks = tasks
        self._member = member
        self._forwarder: Forwarder | None = None
        self._outgoing: dict[str, OutgoingLink] = {}
        self._incoming: dict[str, IncomingLink] = {}
        # Whether a session of an account was taken over from a router that has not given yet what it had for it.
        self.is_unsettled: Callable[[str, str], bool] = lambda _account, _router: False
        # Set when another router has opened its link, and then replaced.
        self._come = asyncio.Event()

    def start(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def view_changed(self, view: ClusterView) -> None:
        """Opens links to routers that came. Called before the forwarder learns of the view."""
        assert self._forwarder is not None
        for node in view.with_router_sessions():
            if node.incarnation not in self._outgoing and node.incarnation != self._own.incarnation:
                self._open(node)

    def _open(self, node: Node) -> OutgoingLink:
        assert self._forwarder is not None
        link = self._outgoing[node.incarnation] = OutgoingLink(node, self._forwarder)
        link.task = self._tasks.spawn(self._keep(link), f"forward link to {node.hostname}")
        return link

    def view_applied(self, view: ClusterView) -> None:
        """Ends links to routers that went. Called when the forwarder knows the view, for what comes back goes
        another way."""
        alive = {node.incarnation for node in view.living_routers()}
        for gone in set(self._incoming) - alive:
            incoming = self._incoming.pop(gone)
            if incoming.handling is not None:
                incoming.handling.cancel()
        for gone in set(self._outgoing) - alive:
            link = self._outgoing.pop(gone)
            log.debug("forward_link_ended", router=link.node.hostname, incarnation=gone)
            link.lost()

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        assert self._forwarder is not None
        link = self._outgoing.get(node)
        try:
            if link is not None:
                link.send(item, sent, refusals_seen)
                return
        except Overflow:
            log.warning("forward_link_full", router=link.node.hostname if link else node)
        # Not within this call: its caller has not noted yet that it was sent.
        given_up = self._forwarder.lost if link is None else self._forwarder.dropped
        asyncio.get_running_loop().call_soon(given_up, sent)

    def crowded(self, plan: Plan) -> bool:
        """Whether a link that a plan needs should get nothing more for now."""
        for node in (plan.decides, *plan.nodes):
            link = self._outgoing.get(node)
            if link is not None and link.outbox.congested:
                return True
        return False

    def totals(self) -> tuple[int, int, int]:
        """Batches, envelopes and bytes of stanzas that were sent to other routers."""
        links = self._outgoing.values()
        return (
            sum(link.outbox.sequence for link in links),
            sum(link.outbox.sent_envelopes for link in links),
            sum(link.outbox.sent_bytes for link in links),
        )

    @property
    def is_cut(self) -> bool:
        """Whether another router is out of reach."""
        return any(not link.up for link in self._outgoing.values())

    def unsafe_bytes(self) -> int:
        """What other routers have of messages that senders here wait for."""
        return sum(link.unsafe_bytes for link in self._outgoing.values())

    # --- calls ---

    async def _keep(self, link: OutgoingLink) -> None:
        node = link.node
        while True:
            why, _ = await why_ended(self._forward(link), lambda why: self._member.report(node, why))
            link.up = False
            log.debug("forward_link_down", router=node.hostname, reason=why)
            await asyncio.sleep(RETRY)

    async def _forward(self, link: OutgoingLink) -> None:
        node = link.node
        stub: Any = RouterServiceStub(self._channels.to(node))
        call: Any = stub.Forward()
        writers = Tasks(lambda _name, _error: call.cancel())
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT):
                hello = ForwardHello(
                    router_incarnation=self._own.incarnation,
                    resume_after=link.outbox.received,
                    fresh=not link.welcomed,
                )
                await call.write(ForwardRequest(hello=hello))
                first = await call.read()
            if first is grpc.aio.EOF or not first.HasField("welcome"):
                return
            self._member.reaches(node)
            link.welcomed = link.up = True
            if first.welcome.resume_after < link.outbox.confirmed_through:
                # It has forgotten the link, and with it what it may not have dealt with.
                log.warning("forward_link_forgotten", router=node.hostname)
                self._open(node)
                link.lost()
                return
            log.debug("forward_link_up", router=node.hostname, resumed_after=first.welcome.resume_after)
            link.outbox.resume(first.welcome.resume_after)
            writers.spawn(link.outbox.run(call.write), f"forwards to {node.hostname}")
            while (response := await call.read()) is not grpc.aio.EOF:
                link.receive(response)
        finally:
            call.cancel()
            await writers.stop()

    async def watch(self) -> None:
        """Tells the forwarder what other routers have taken and not made safe for long."""
        doubts: dict[tuple[str, ...], Doubt] = {}
        while True:
            await asyncio.sleep(LOOK)
            if self._forwarder is not None:
                doubts = self._doubts(time.monotonic() - SLOW, doubts)
                self._forwarder.doubt(doubts)

    def _doubts(self, moment: float, before: Mapping[tuple[str, ...], Doubt]) -> dict[tuple[str, ...], Doubt]:
        """What a router has taken that does not answer may be for a session that others have by now: whatever comes
        behind it waits until it is safe, and until a session here that was taken over from there has got it."""
        doubts = {
            flow: doubt for flow, doubt in before.items() if doubt.silent and self.is_unsettled(flow[1], doubt.node)
        }
        for name, link in self._outgoing.items():
            silent = link.is_silent(moment)
            for flow in islice(link.unsafe_since(moment), MOST_SLOW):
                doubts[flow] = Doubt(name, silent or before.get(flow) == Doubt(name, True))
        return doubts

    def incoming(self, incarnation: str, fresh: bool) -> IncomingLink:
        """The link that a router's call carries on, or a new one."""
        assert self._forwarder is not None
        link = self._incoming.get(incarnation)
        if link is None or fresh:
            if link is not None and link.handling is not None:
                link.handling.cancel()
            link = self._incoming[incarnation] = IncomingLink(incarnation, self._forwarder)
            self._come.set()
            self._come = asyncio.Event()
        return link

    async def known(self, timeout: float) -> bool:
        """Waits until every router of the view has opened its link to this one; False when one has not in time."""
        try:
            async with asyncio.timeout(timeout):
                while set(self._outgoing) - set(self._incoming):
                    await self._come.wait()
        except TimeoutError:
            return False
        return True
