"""A connector's links to routers (router.v1 Attach)."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import grpc

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import (
    AttachHello,
    AttachRequest,
    AttachResponse,
    SessionProgress,
    StreamCommand,
    StreamEvent,
)
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.kit.link import INTERVAL, LAST_WRITE, Outbox, Overflow, in_order, why_ended
from tidings.kit.logging import get_logger
from tidings.kit.module import NONZA
from tidings.kit.tasks import Tasks
from tidings.xmpp.errors import StreamError

if TYPE_CHECKING:
    from services.connector.client_stream import ClientStream
    from services.connector.session_copy import Sent
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
    """One link to one router: sends what happens to streams, and does what the router answers. A link to another
    process outlives its calls; it ends when the router has failed."""

    def __init__(self, streams: Streams, node: Node, local: bool) -> None:
        self.node = node
        # The router is in this process.
        self.local = local
        self._streams = streams
        # The call that carries it now.
        self.call: Any = None
        # A call has been answered.
        self.welcomed = False
        # The router is gone; or it has not taken what it was sent, or has forgotten the link.
        self.gone = False
        self.broken = False
        self.outbox: Outbox[AttachRequest] = Outbox(AttachRequest, 0 if local else INTERVAL, resumable=not local)
        self.outbox.on_relief = self._relieved
        # Streams that are not read until the router takes more; who was read last stands last.
        self.held: dict[ClientStream, None] = {}

    @property
    def congested(self) -> bool:
        return self.outbox.congested

    def send(self, session: str, sent: Sent) -> None:
        """What the client of a session has sent. Raises Overflow."""
        kind, type_, id_, to, children, raw, answered = sent
        self.outbox.begin(len(raw)).add(
            origin=session, kind=kind, type=type_, id=id_, to_jid=to, children=children, stanza=raw, answered=answered
        )

    def event(self, stream: int) -> StreamEvent:
        """An event of a stream, behind all its stanzas; the caller fills it in."""
        try:
            batch = self.outbox.begin_item()
        except Overflow as error:
            # Its streams end with the call: whoever tells something here need not care.
            log.error("router_does_not_take", router=self.node.hostname, reason=str(error))
            self.broken = True
            if self.call is not None:
                self.call.cancel()
            return StreamEvent()
        return batch.events.add(stream=stream, position=len(batch.envelopes))

    def receive(self, response: AttachResponse) -> None:
        """Takes a batch from the router. Raises Gap."""
        if self.local:
            self.outbox.received = response.sequence
        else:
            self.outbox.confirmed(response.received_through)
            if not response.sequence or not self.outbox.take(response.sequence):
                return
            if response.prompt:
                self.outbox.confirm_at_once()
            else:
                self.outbox.confirm_soon()
        for progress in response.progress:
            self._progress(progress)
        if not response.commands:
            for envelope in response.envelopes:
                self._deliver(envelope)
            return
        for item in in_order(response.envelopes, response.commands):
            if isinstance(item, Envelope):
                self._deliver(item)
            elif not item.stream:
                self._streams.copies.command(self, item)
            elif (stream := self._streams.get(item.stream)) is None:
                self._streams.copies.of_gone_stream(self, item)
            elif stream.link is self:
                self._command(stream, item)

    def _command(self, stream: ClientStream, command: StreamCommand) -> None:
        try:
            stream.command(command)
        except StreamError as error:
            # What one stream is not ready for ends that one, not the link, and with it all others.
            which = command.WhichOneof("command")
            log.error("not_due", router=self.node.hostname, jid=stream.jid, command=which, reason=str(error))
            stream.close("internal-server-error", "the server has lost track of this stream; please connect again")

    def _deliver(self, envelope: Envelope) -> None:
        stream = self._served(envelope.target)
        if stream is None:
            self._streams.copies.delivered(self, envelope)
        else:
            raw = envelope.stanza
            if stream.copy is not None and envelope.kind != NONZA:
                stream.copy.delivered(envelope, raw)
            stream.deliver(raw)

    def _progress(self, progress: SessionProgress) -> None:
        stream = self._served(progress.session)
        if stream is None:
            self._streams.copies.progress(self, progress)
        elif stream.copy is not None:
            stream.copy.progress(progress)

    def _served(self, session: str) -> ClientStream | None:
        """The stream that this router serves for a session. One that is only on its way to it, or has gone on at
        another one, is none: what comes then is for a copy here, if this router has asked for one."""
        stream = self._streams.by_session.get(session)
        if stream is None or stream.link is not self:
            return None
        relocation, copy = stream.relocation, stream.copy
        if (relocation is not None and relocation.reattaching) or (copy is not None and not copy.is_whole):
            return None
        return stream

    def _relieved(self) -> None:
        held, self.held = self.held, {}
        for stream in held:
            stream.router_relieved()

    def ended(self) -> None:
        """Nothing more comes of it. What there is a copy of goes on at another router, if this one is gone."""
        for stream in self._streams:
            if stream.link is self:
                stream.router_lost(self.gone)
        if self.gone:
            self._streams.copies.router_gone(self)


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

    def now(self, router: str) -> RouterLink | None:
        """The link to a router, if there is one."""
        return self._links.get(router)

    async def other(self, router: str) -> RouterLink | None:
        """The link to a router that is not this one: the one in this process, else any; None when there is none
        before long."""
        try:
            async with asyncio.timeout(LINK_TIMEOUT):
                while not (up := [link for link in self._links if link != router and self._is_up(link)]):
                    await self._come.wait()
        except TimeoutError:
            return None
        return self._links[self._own.incarnation if self._own.incarnation in up else secrets.choice(up)]

    async def _keep(self, node: Node) -> None:
        """Attaches to a router, again and again, until cancelled: it has failed or is gone."""
        link = RouterLink(self._streams, node, node.incarnation == self._own.incarnation)
        try:
            while True:
                pause = await self._try(link)
                if link.local or link.broken:
                    link.ended()
                    link = RouterLink(self._streams, node, link.local)
                await asyncio.sleep(pause)
        finally:
            if self._keeping.get(node.incarnation) is not asyncio.current_task():
                link.gone = True
                link.ended()

    async def _try(self, link: RouterLink) -> float:
        """One call; the seconds until the next one."""
        node = link.node
        why, refusal = await why_ended(self._attach(link), node, self._member)
        log.debug("router_link_down", router=node.hostname, reason=why)
        return SOON if refusal is not None else RETRY

    async def _attach(self, link: RouterLink) -> None:
        node, outbox = link.node, link.outbox
        stub: Any = RouterServiceStub(self._channels.to(node))
        call: Any = stub.Attach()
        link.call = call
        writers = Tasks(lambda _name, _error: call.cancel())
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT):
                hello = AttachHello(
                    connector_incarnation=self._own.incarnation, resume_after=outbox.received,
                    view_version=self._member.view.version, location=self._location, fresh=not link.welcomed,
                )  # fmt: skip
                await call.write(AttachRequest(hello=hello))
                response = await call.read()
            if response is grpc.aio.EOF or not response.HasField("welcome"):
                return
            self._member.reaches(node)
            if link.welcomed and response.welcome.fresh:
                log.warning("router_forgot_link", router=node.hostname)
                link.broken = True
                return
            link.welcomed = True
            if not link.local:
                outbox.resume(response.welcome.resume_after)
            writers.spawn(outbox.run(call.write), f"writes to router {node.hostname}")
            self._links[node.incarnation] = link
            self._attached.set()
            self._come.set()
            self._come = asyncio.Event()
            log.debug("router_attached", router=node.hostname)
            while (response := await call.read()) is not grpc.aio.EOF:
                link.receive(response)
        finally:
            if self._links.pop(node.incarnation, None) is not None:
                log.info("router_lost", router=node.hostname)
            if not self._links:
                self._attached.clear()
            call.cancel()
            outbox.end()
            await writers.finish(LAST_WRITE)
