"""RouterService: takes the links of connectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from services.router.connector_link import ConnectorLink
from services.router.negotiation import Negotiator
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.router.v1.router_pb2 import AttachRequest, AttachResponse, ForwardRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceServicer
from tidings.kit.grpc_server import current_caller
from tidings.kit.link import INTERVAL, LAST_WRITE, Outbox, Overflow
from tidings.kit.logging import get_logger
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks

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
        spawn: Callable[[Any, str], Any],
        ready: Callable[[], bool],
    ) -> None:
        self._incarnation = incarnation
        self._negotiator = negotiator
        self._spawn = spawn
        self._ready = ready
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
        welcome = outbox.begin_item().welcome
        welcome.router_incarnation = self._incarnation
        welcome.fresh = True
        writers = Tasks()
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
            log.debug("connector_detached", connector=caller.name, incarnation=incarnation)
            link.closed()
            outbox.end()
            await writers.finish(LAST_WRITE)

    async def Forward(  # type: ignore[override]
        self, request_iterator: AsyncIterator[ForwardRequest], context: Any
    ) -> None:
        """As the contract says of a router that is alone: routers do not share their users yet."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this router is the only one of its cluster")
