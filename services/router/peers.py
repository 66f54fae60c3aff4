"""What a router asks another one for: to take a session over, to end one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

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
# Seconds for it to say anything, and for which that counts.
ANSWER_TIMEOUT = 2.0
FRESH = 1.0


class Failed(Exception):
    """The other router has refused, or has not answered: then it may or may not have done it. `reason` is its own,
    UNSPECIFIED where it gave none; the text is for people. `answered`: it has said something."""

    def __init__(self, reason: int, text: str, answered: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.answered = answered


class Peers:
    """The other routers, as callers see them."""

    def __init__(self, channels: Channels, spawn: Callable[[Any, str], Any]) -> None:
        self._channels = channels
        self._spawn = spawn
        # By incarnation: when it said something last, when it did not, and the question that is under way.
        self._heard: dict[str, float] = {}
        self._silent: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[bool]] = {}

    async def adopt(self, node: Node, request: AdoptSessionRequest) -> AdoptSessionResponse:
        """Raises Failed."""
        return await _answer(lambda: self._stub(node).AdoptSession(request, timeout=ADOPT_TIMEOUT))

    async def end(self, node: Node, request: EndSessionRequest, seconds: float = END_TIMEOUT) -> None:
        """Raises Failed."""
        await _answer(lambda: self._stub(node).EndSession(request, timeout=seconds))

    async def answers(self, node: Node, seconds: float) -> bool:
        """Whether a router says anything at all in time."""
        if time.monotonic() - self._silent.get(node.incarnation, 0.0) < FRESH:
            return False
        stub = HealthStub(self._channels.to(node))
        try:
            await _answer(lambda: stub.Check(HealthCheckRequest(), timeout=seconds))
        except Failed as error:
            if not error.answered:
                self._silent[node.incarnation] = time.monotonic()
            return error.answered
        return True

    async def answered(self, node: Node) -> bool:
        """Whether a router has said something of late, or does now; one question at a time."""
        if time.monotonic() - self._heard.get(node.incarnation, 0.0) < FRESH:
            return True
        asking = self._asking.get(node.incarnation)
        if asking is None:
            asking = self._asking[node.incarnation] = self._spawn(
                self.answers(node, ANSWER_TIMEOUT), f"whether {node.hostname} answers"
            )
            asking.add_done_callback(lambda _done: self._asking.pop(node.incarnation))
        if not await asyncio.shield(asking):
            return False
        self._heard[node.incarnation] = time.monotonic()
        return True

    def _stub(self, node: Node) -> Any:
        return RouterServiceStub(self._channels.to(node))


async def _answer(call: Callable[[], Awaitable[T]]) -> T:
    try:
        return await call()
    except grpc.RpcError as error:
        silent = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        raise Failed(reason(error), describe(error), answered=not silent) from None
    except grpc.aio.UsageError as error:
        raise Failed(ErrorReason.ERROR_REASON_UNSPECIFIED, str(error)) from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # So gRPC says that the channel was closed under the call: the node has left the view.
        raise Failed(ErrorReason.ERROR_REASON_UNSPECIFIED, "the node has left") from None
