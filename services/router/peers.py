"""What a router asks another one for: to take a session over, to end one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.router.v1.router_pb2 import AdoptSessionRequest, AdoptSessionResponse, EndSessionRequest
from tidings.api.router.v1.router_pb2_grpc import RouterServiceStub
from tidings.cluster.node import Node
from tidings.kit.rpc_errors import describe, reason

if TYPE_CHECKING:
    from tidings.kit.channel import Channels

T = TypeVar("T")

# Seconds for another router to answer.
ADOPT_TIMEOUT = 5.0
END_TIMEOUT = 3.0


class Failed(Exception):
    """The other router has refused, or has not answered: then it may or may not have done it. `reason` is its own,
    UNSPECIFIED where it gave none; the text is for people."""

    def __init__(self, reason: int, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Peers:
    """The other routers, as callers see them."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def adopt(self, node: Node, request: AdoptSessionRequest) -> AdoptSessionResponse:
        """Raises Failed."""
        return await _answer(lambda: self._stub(node).AdoptSession(request, timeout=ADOPT_TIMEOUT))

    async def end(self, node: Node, request: EndSessionRequest) -> None:
        """Raises Failed."""
        await _answer(lambda: self._stub(node).EndSession(request, timeout=END_TIMEOUT))

    def _stub(self, node: Node) -> Any:
        return RouterServiceStub(self._channels.to(node))


async def _answer(call: Callable[[], Awaitable[T]]) -> T:
    try:
        return await call()
    except grpc.RpcError as error:
        raise Failed(reason(error), describe(error)) from None
    except grpc.aio.UsageError as error:
        raise Failed(ErrorReason.ERROR_REASON_UNSPECIFIED, str(error)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # So gRPC says that the channel was closed under the call: the node has left the view.
        raise Failed(ErrorReason.ERROR_REASON_UNSPECIFIED, "the node has left") from None
