"""A connector's links to routers (router.v1 Attach)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import AttachRequest, AttachResponse, StreamEvent
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.kit.link import INTERVAL, Outbox, Overflow, in_order
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import describe, error_detail
from tidings.kit.tasks import Tasks, is_cancelled

if TYPE_CHECKING:
    from services.connector.client_stream import ClientStream
    from services.connector.streams import Streams
    from tidings.kit.channel import Channels
    from tidings.kit.membership import Member

log = get_logger("connector")

# Seconds for a router to answer the first request, and between two tries to reach one; one that is only just
# starting, or already stopping, says so, and is asked again sooner.
WELCOME_TIMEOUT = 5.0
RETRY = 0.5
SOON = 0.05
# Seconds to wait for a link to a router that a stream is sent on to.
LINK_TIMEOUT = 5.0


class RouterLink:
    """One link to one router: sends what happens to streams, and does what the router answers."""

    def __init__(self, streams: Streams, node: Node, local: bool, cut_off: Callable[[], Any]) -> None:
        """`cut_off` ends the call of a router that does not take what it is sent."""
        self.node = node
        self._streams = streams
        self._cut_off = cut_off
        self.outbox: Outbox[AttachRequest] = Outbox(AttachRequest, 0 if local else INTERVAL)
        self.outbox.on_relief = self._relieved

    @property
    def congested(self) -> bool:
        return self.outbox.congested

    def event(self, stream: int) -> StreamEvent:
        """An event of a stream, behind all its stanzas; the caller fills it in."""
        try:
            batch = self.outbox.begin_item()
        except Overflow as error:
            # Its streams end with the call: whoever tells something here need not care.
            log.error("router_does_not_take", router=self.node.hostname, reason=str(error))
            self._cut_off()
            return StreamEvent()
        return batch.events.add(stream=stream, position=len(batch.envelopes))

    def receive(self, response: AttachResponse) -> None:
        """Takes a batch from the router."""
        by_session = self._streams.by_session
        if not response.commands:
            for envelope in response.envelopes:
                stream = by_session.get(envelope.target)
                if stream is not None:
                    stream.deliver(envelope.stanza)
            return
        for item in in_order(response.envelopes, response.commands):
            if isinstance(item, Envelope):
                stream = by_session.get(item.target)
                if stream is not None:
                    stream.deliver(item.stanza)
            else:
                stream = self._streams.get(item.stream)
                if stream is not None:
                    stream.command(item)

    def _relieved(self) -> None:
        for stream in self._streams:
            if stream.link is self:
                stream.router_relieved()


class RouterLinks:
    """Keeps a link to every router that serves, and picks one for each stream."""

    def __init__(
        self, streams: Streams, member: Member, channels: Channels, own: Node, tasks: Tasks, location: str = ""
    ) -> None:
        """`location`: where clients should come back to; '' for anywhere."""
        self._streams = streams
        self._location = location
        self._member = member
        self._channels = channels
        self._own = own
        self._tasks = tasks
        self._links: dict[str, RouterLink] = {}
        # By router: what keeps the link to it.
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._attached = asyncio.Event()
        # Set when a link comes, and then replaced.
        self._come = asyncio.Event()

    def start(self) -> None:
        self._member.on_change(lambda _view: self._look())
        self._look()

    def _look(self) -> None:
        view = self._member.view
        for node in view.with_service("router"):
            if node.state in (NodeState.UP, NodeState.SUSPECT) and node.incarnation not in self._keeping:
                task = self._tasks.spawn(self._keep(node), f"link to router {node.hostname}")
                self._keeping[node.incarnation] = task
        # What a router says that has failed counts no more.
        for gone in set(self._keeping) - {node.incarnation for node in view.living_routers()}:
            self._keeping.pop(gone).cancel()

    async def attached(self) -> None:
        """Waits until there is a router to serve streams."""
        await self._attached.wait()

    def choose(self, stream: ClientStream) -> RouterLink | None:
        """The router for a new stream: the one in this process, else spread evenly."""
        if self._own.incarnation in self._links:
            return self._links[self._own.incarnation]
        up = [link for link in self._links if self._is_up(link)] or list(self._links)
        return self._links[rendezvous(f"{self._own.incarnation}/{stream.number}", sorted(up))] if up else None

    def _is_up(self, router: str) -> bool:
        node = self._member.view.by_incarnation(router)
        return node is not None and node.state is NodeState.UP

    async def to(self, router: str) -> RouterLink | None:
        """The link to a router; None when there is none before long."""
        try:
            async with asyncio.timeout(LINK_TIMEOUT):
                while (link := self._links.get(router)) is None:
                    await self._come.wait()
        except TimeoutError:
            return None
        return link

    async def _keep(self, node: Node) -> None:
        """Attaches to a router, again and again, until cancelled: it has failed or is gone."""
        while True:
            pause = RETRY
            try:
                await self._attach(node)
                why = "the call ended"
            except grpc.RpcError as error:
                why = describe(error)
                if error_detail(error) is None:
                    self._member.report(node, why)
                else:
                    pause = SOON  # it has answered
            except (TimeoutError, OSError) as error:
                why = str(error) or "no answer"
                self._member.report(node, why)
            except asyncio.CancelledError:
                if is_cancelled():
                    raise
                why = "this side ended the call"
            log.debug("router_link_down", router=node.hostname, reason=why)
            await asyncio.sleep(pause)

    async def _attach(self, node: Node) -> None:
        local = node.incarnation == self._own.incarnation
        stub: Any = RouterServiceStub(self._channels.to(node))
        call: Any = stub.Attach()
        link = RouterLink(self._streams, node, local, call.cancel)
        hello = link.outbox.begin_item().hello
        hello.connector_incarnation = self._own.incarnation
        hello.view_version = self._member.view.version
        hello.location = self._location
        writers = Tasks(lambda _name, _error: call.cancel())
        writers.spawn(link.outbox.run(call.write), f"writes to router {node.hostname}")
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT):
                response = await call.read()
            if response is grpc.aio.EOF:
                return
            self._member.reaches(node)
            self._links[node.incarnation] = link
            self._attached.set()
            self._come.set()
            self._come = asyncio.Event()
            log.debug("router_attached", router=node.hostname)
            while response is not grpc.aio.EOF:
                link.outbox.received = response.sequence
                link.receive(response)
                response = await call.read()
        finally:
            lost = self._links.pop(node.incarnation, None) is not None
            if not self._links:
                self._attached.clear()
            call.cancel()
            await writers.stop()
            if lost:
                log.info("router_lost", router=node.hostname)
                for stream in self._streams:
                    if stream.link is link:
                        stream.router_lost()
