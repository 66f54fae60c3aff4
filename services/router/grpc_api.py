"""RouterService: takes the links of connectors and of other routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from services.router.adoption import Adoption
from services.router.binding import Binding
from services.router.connector_link import ConnectorLink
from services.router.forward_links import ForwardLinks
from services.router.negotiation import Negotiator
from services.router.sessions import Sessions
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.router.v1.router_pb2 import (
    AdoptSessionRequest,
    AdoptSessionResponse,
    AttachHello,
    AttachRequest,
    AttachResponse,
    AttachWelcome,
    EndSessionRequest,
    EndSessionResponse,
    ForwardRequest,
    ForwardResponse,
    ForwardWelcome,
)
from tidings.api.router.v1.router_pb2_grpc import RouterServiceServicer
from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import current_caller
from tidings.kit.identity import Caller
from tidings.kit.link import INTERVAL, LAST_WRITE, Gap, Outbox, Overflow
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid, JidError

log = get_logger("router")


# Seconds for which a connector's link waits for its next call; then its streams end.
LINK_TIMEOUT = 10.0


class RouterApi(RouterServiceServicer):
    """Serves router.v1. `ready` says whether the router takes links now."""

    def __init__(
        self,
        incarnation: str,
        negotiator: Negotiator,
        sessions: Sessions,
        forward_links: ForwardLinks,
        adoption: Adoption,
        binding: Binding,
        spawn: Callable[[Any, str], Any],
        ready: Callable[[], bool],
    ) -> None:
        self._incarnation = incarnation
        self._negotiator = negotiator
        self._sessions = sessions
        self._forward_links = forward_links
        self._adoption = adoption
        self._binding = binding
        self._spawn = spawn
        self._ready = ready
        # What is waited for before anything is dealt with that has come while this router stood still.
        self.stood_still: Callable[[], Awaitable[object] | None] = lambda: None
        # The links of connectors, by their incarnations; and which of these the view has shown.
        self._links: dict[str, ConnectorLink] = {}
        # Those that have no call: their connectors are out of reach.
        self.cut: set[ConnectorLink] = set()
        self._seen: set[str] = set()

    async def Attach(  # type: ignore[override] # grpc.aio also takes a coroutine that writes by itself
        self, request_iterator: AsyncIterator[AttachRequest], context: Any
    ) -> None:
        if not self._ready():
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "the router is starting or stopping")
        caller = current_caller(context)
        first = await context.read()
        if first is grpc.aio.EOF or not first.HasField("hello"):
            raise TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, "the first request must carry `hello`")
        local = caller.kind == "local"
        incarnation = first.hello.connector_incarnation
        if not local and incarnation != caller.incarnation:
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_ALLOWED, "`connector_incarnation` is not the caller's own"
            )
        link, fresh = self._link(caller, first.hello)
        handling = asyncio.current_task()
        before, link.handling = link.handling, handling
        if before is not None:
            # The connector has opened another call, so the one before is dead, whether we have noticed or not.
            before.cancel()
        outbox = link.outbox
        welcome = AttachWelcome(router_incarnation=self._incarnation, resume_after=outbox.received, fresh=fresh)
        writers = Tasks()
        log.debug("connector_attached", connector=caller.name, incarnation=incarnation)
        try:
            await context.write(AttachResponse(welcome=welcome))
            if not local:
                outbox.resume(first.hello.resume_after)
            writers.spawn(outbox.run(context.write), f"link to {caller.name}")
            while (request := await context.read()) is not grpc.aio.EOF:
                if (looking := self.stood_still()) is not None:
                    await looking
                link.receive(request)
        except Overflow as error:
            log.error("connector_does_not_read", connector=caller.name, reason=str(error))
            self._end(link)
        except Gap as error:
            log.warning("attach_call_ended", connector=caller.name, reason=str(error))
        finally:
            log.debug("connector_detached", connector=caller.name, incarnation=incarnation)
            if link.handling is handling:
                link.handling = None
                if local:
                    self._end(link)
                elif not link.over:
                    self.cut.add(link)
                    link.expires = asyncio.get_running_loop().call_later(LINK_TIMEOUT, self._end, link)
            # What it has not written goes with the next call.
            outbox.end()
            await writers.finish(LAST_WRITE)

    def _link(self, caller: Caller, hello: AttachHello) -> tuple[ConnectorLink, bool]:
        """The link that a connector's call carries on, or a new one; and whether it is new."""
        incarnation, local = hello.connector_incarnation, caller.kind == "local"
        link = self._links.get(incarnation)
        if link is not None and (hello.fresh or local):
            self._end(link)
            link = None
        fresh = link is None
        if link is None:
            outbox: Outbox[AttachResponse] = Outbox(AttachResponse, 0 if local else INTERVAL, resumable=not local)
            link = self._links[incarnation] = ConnectorLink(
                self._negotiator, outbox, caller.name, incarnation, local, self._spawn, lambda: None
            )
            link.cut_off = lambda: self._cut_off(link)
        if link.expires is not None:
            link.expires.cancel()
            link.expires = None
        self.cut.discard(link)
        link.location = hello.location
        return link, fresh

    def _cut_off(self, link: ConnectorLink) -> None:
        if not link.over:
            log.error("link_cut_off", connector=link.name, reason="it does not take what it is sent")
            self._end(link)

    def _end(self, link: ConnectorLink) -> None:
        """A link is over, and its streams with it."""
        if self._links.get(link.incarnation) is link:
            del self._links[link.incarnation]
        self.cut.discard(link)
        if link.handling is not None and link.handling is not asyncio.current_task():
            link.handling.cancel()
        if not link.over:
            link.closed()

    def stop(self) -> None:
        """No link ends any more for want of a call."""
        for link in self.links:
            if link.expires is not None:
                link.expires.cancel()

    def view_changed(self, view: ClusterView) -> None:
        """Connectors that are gone send nothing more."""
        alive = {node.incarnation for node in view.with_service("connector") if node.state is not NodeState.FAILED}
        for gone in self._seen - alive:
            if (link := self._links.get(gone)) is not None:
                self._end(link)
        self._seen = alive

    def surrender(self, session: str, router: str) -> None:
        """Asks all connectors for the copy of a session: its router does not answer."""
        self._negotiator.reattachment.wanted.add(session)
        for link in self.links:
            link.surrender(session, router)

    @property
    def links(self) -> list[ConnectorLink]:
        return list(self._links.values())

    async def Forward(  # type: ignore[override]
        self, request_iterator: AsyncIterator[ForwardRequest], context: Any
    ) -> None:
        caller = current_caller(context)
        first = await context.read()
        if first is grpc.aio.EOF or not first.HasField("hello"):
            raise TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, "the first request must carry `hello`")
        if first.hello.router_incarnation != caller.incarnation:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_ALLOWED, "`router_incarnation` is not the caller's own")
        link = self._forward_links.incoming(caller.incarnation, first.hello.fresh)
        before, link.handling = link.handling, asyncio.current_task()
        if before is not None:
            # The caller has opened another call, so the one before is dead, whether we have noticed or not.
            before.cancel()
        await context.write(ForwardResponse(welcome=ForwardWelcome(resume_after=link.outbox.received)))
        link.outbox.resume(first.hello.resume_after)
        writers = Tasks()
        writers.spawn(link.outbox.run(context.write), f"answers to {caller.name}")
        try:
            while (request := await context.read()) is not grpc.aio.EOF:
                if (looking := self.stood_still()) is not None:
                    await looking
                link.receive(request)
        except (Gap, Overflow) as error:
            log.warning("forward_call_ended", router=caller.name, reason=str(error))
        finally:
            if link.handling is asyncio.current_task():
                link.handling = None
            await writers.stop()

    async def AdoptSession(self, request: AdoptSessionRequest, context: Any) -> AdoptSessionResponse:
        if not self._ready():
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "the router is starting or stopping")
        epoch, ticket = await self._adoption.adopt(request, current_caller(context).incarnation)
        return AdoptSessionResponse(epoch=epoch, ticket=ticket)

    async def EndSession(self, request: EndSessionRequest, context: Any) -> EndSessionResponse:
        # Carried through also when the caller waits no longer: gRPC cancels its handlers then.
        await asyncio.shield(self._spawn(self._end_session(request), "end a session that another one replaces"))
        return EndSessionResponse()

    async def _end_session(self, request: EndSessionRequest) -> None:
        try:
            session = self._sessions.get(request.session)
            if session is not None:
                end = self._negotiator.remove if request.account_removed else self._negotiator.displace
                await end(session)
            if not await self._negotiator.ended(request.session) and session is None:
                await self._binding.clear(Jid.parse(request.jid), request.session)
        except (DatabaseAway, JidError) as error:
            log.info("session_not_ended", session=request.session, reason=str(error))
        except Exception:
            log.exception("session_end_failed", session=request.session)
