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
    """Watches one registry after the other: ours, and while none of them answers those of other nodes. While no
    registry at all does, the last view holds."""

    def __init__(
        self,
        registries: Callable[[], Sequence[Any]],
        clock: Callable[[], float],
        peers: Callable[[], Sequence[Any]] = tuple,
    ) -> None:
        """`registries`, `peers`: channels, in the order in which to try them."""
        self._registries = registries
        self._peers = peers
        self._clock = clock
        self._listeners: list[Callable[[ClusterView], None]] = []
        self._changed = asyncio.Event()
        # The call that brings the changes; where our view stands while a registry has a newer one, and since when.
        self._call: Any = None
        self._behind: tuple[int, float] | None = None
        # A registry of another node is watched.
        self._aside = False
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
                await self._follow(channel)
            self._aside = True
            tried: list[Any] = []
            # Each time anew: of nodes that have gone meanwhile the channels are closed.
            while self._aside and (channel := next((one for one in self._peers() if one not in tried), None)):
                tried.append(channel)
                await self._follow(channel)
            self._aside = False
            await asyncio.sleep(RETRY)

    async def _follow(self, channel: Any) -> None:
        """Takes what a registry tells, until it tells nothing more."""
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

    def compare(self, version: int) -> None:
        """A registry of ours has told its version: so it is there, and watched again. When our view is behind for
        long, the one that is watched hangs, and the next one is."""
        ours = self.view.version
        now = self._clock()
        if self._aside:
            self._aside = False
            self._call.cancel()
        elif version <= ours:
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
