"""RouterService: takes the links of connectors and of other routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
    AttachRequest,
    AttachResponse,
    EndSessionRequest,
    EndSessionResponse,
    ForwardRequest,
    ForwardResponse,
    ForwardWelcome,
)
from tidings.api.router.v1.router_pb2_grpc import RouterServiceServicer
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import current_caller
from tidings.kit.link import INTERVAL, LAST_WRITE, Gap, Outbox, Overflow
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid, JidError

log = get_logger("router")


def _cutter(peer: str) -> Callable[[], None]:
    """Ends the call that is being handled, for a peer that does not take what it is sent."""
    handling = asyncio.current_task()
    assert handling is not None

    def cut_off() -> None:
        if not handling.cancelling():
            log.error("link_cut_off", peer=peer, reason="it does not take what it is sent")
            handling.cancel()

    return cut_off


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
        # The calls of connectors, by their incarnations.
        self._attached: dict[str, asyncio.Task[Any]] = {}
        self.links: set[ConnectorLink] = set()

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
        outbox: Outbox[AttachResponse] = Outbox(AttachResponse, 0 if local else INTERVAL)
        link = ConnectorLink(
            self._negotiator,
            outbox,
            caller.name,
            incarnation,
            local,
            self._spawn,
            _cutter(f"connector {caller.name}"),
        )
        link.location = first.hello.location
        welcome = outbox.begin_item().welcome
        welcome.router_incarnation = self._incarnation
        welcome.fresh = True
        writers = Tasks()
        handling = asyncio.current_task()
        assert handling is not None
        before = self._attached.get(incarnation)
        if before is not None:
            # The connector has opened another call, so the one before is dead, whether we have noticed or not.
            before.cancel()
        self._attached[incarnation] = handling
        self.links.add(link)
        log.debug("connector_attached", connector=caller.name, incarnation=incarnation)
        writers.spawn(outbox.run(context.write), f"link to {caller.name}")
        try:
            request = first
            while request is not grpc.aio.EOF:
                outbox.received = request.sequence
                link.receive(request)
                request = await context.read()
        except Overflow as error:
            log.error("connector_does_not_read", connector=caller.name, reason=str(error))
        finally:
            self.links.discard(link)
            if self._attached.get(incarnation) is handling:
                del self._attached[incarnation]
            log.debug("connector_detached", connector=caller.name, incarnation=incarnation)
            link.closed()
            outbox.end()
            await writers.finish(LAST_WRITE)

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
            else:
                await self._binding.clear(Jid.parse(request.jid), request.session)
        except (DatabaseAway, JidError) as error:
            log.info("session_not_ended", session=request.session, reason=str(error))
        except Exception:
            log.exception("session_end_failed", session=request.session)
