"""The links between routers (router.v1 Forward): what one forwards, and what the other answers.

Each router opens one link to each other one and sends on it; what comes back are answers. A link outlives its
calls: it ends when the other router's incarnation has left the view.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import grpc

from services.router.forward_incoming import IncomingLink
from services.router.forward_outgoing import SLOW, OutgoingLink
from tidings.api.router.v1.router_pb2 import ForwardHello, ForwardRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.flows import Doubt
from tidings.cluster.forwarding import Forwarder, Item, Sent
from tidings.cluster.node import Node
from tidings.cluster.strategy import Plan
from tidings.cluster.view import ClusterView
from tidings.kit.link import Overflow, why_ended
from tidings.kit.logging import get_logger
from tidings.kit.tasks import Tasks

if TYPE_CHECKING:
    from tidings.kit.channel import Channels
    from tidings.kit.membership import Member

log = get_logger("cluster")

# Seconds for a router to answer the first request, and between two tries to reach it.
WELCOME_TIMEOUT = 5.0
RETRY = 0.2

# Seconds between two looks at what other routers have taken that is not safe; and how much of that is looked at:
# while the database is away it is all of it, and no flow goes another way than before.
LOOK = 0.05
MOST_SLOW = 5000


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

    def is_unsafe(self, flow: tuple[str, ...]) -> bool:
        """Whether another router has taken something of a flow, and has not said that it is safe."""
        return any(flow in islice(link.unsafe_since(math.inf), MOST_SLOW) for link in self._outgoing.values())

    # --- calls ---

    async def _keep(self, link: OutgoingLink) -> None:
        node = link.node
        while True:
            why, _ = await why_ended(self._forward(link), node, self._member)
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
        while True:
            await asyncio.sleep(LOOK)
            if self._forwarder is not None:
                self._forwarder.doubt(self._doubts(time.monotonic() - SLOW, self._forwarder.doubts))

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
