"""A process's view of the cluster, kept up to date from a registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import view_after
from tidings.kit.rpc_errors import describe
from tidings.kit.tasks import is_cancelled

log = get_logger("cluster")

RETRY = 0.5
# Seconds for which our view may be behind a registry's.
BEHIND = 1.0


class ViewWatch:
    """Watches one registry after the other; while none answers, the last view holds."""

    def __init__(self, registries: Callable[[], Sequence[Any]], clock: Callable[[], float]) -> None:
        """`registries`: channels, in the order in which to try them."""
        self._registries = registries
        self._clock = clock
        self._listeners: list[Callable[[ClusterView], None]] = []
        self._changed = asyncio.Event()
        # The call that brings the changes; where our view stands while a registry has a newer one, and since when.
        self._call: Any = None
        self._behind: tuple[int, float] | None = None
        self.view = ClusterView()

    def on_change(self, listener: Callable[[ClusterView], None]) -> None:
        """Calls `listener` with each new view."""
        self._listeners.append(listener)

    async def wait_until(self, condition: Callable[[ClusterView], bool], timeout: float) -> bool:
        """Waits for a view that meets a condition; False when none does in time."""
        try:
            async with asyncio.timeout(timeout):
                while not condition(self.view):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Follows the registries' view until cancelled."""
        while True:
            for channel in self._registries():
                stub: Any = RegistryServiceStub(channel)
                try:
                    self._call = stub.WatchNodes(pb.WatchNodesRequest(since=self.view.version))
                    async for update in self._call:
                        self._take(update)
                except grpc.RpcError as error:
                    log.debug("watch_ended", reason=describe(error))
                except asyncio.CancelledError:
                    if is_cancelled():
                        raise
            await asyncio.sleep(RETRY)

    def compare(self, version: int) -> None:
        """A registry has told its version: when ours is behind for long, the one that is watched hangs, and the next
        one is watched."""
        ours = self.view.version
        now = self._clock()
        if version <= ours:
            self._behind = None
        elif self._behind is None or self._behind[0] != ours:
            self._behind = (ours, now)
        elif now - self._behind[1] > BEHIND and self._call is not None:
            log.debug("watch_hangs", view=ours, registry=version)
            self._behind = None
            self._call.cancel()

    def _take(self, update: pb.WatchNodesResponse) -> None:
        self.view = view = view_after(self.view, update)
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(view)
