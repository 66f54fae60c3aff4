"""RegistryService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from services.registry.members import Members
from services.registry.store import Change, ChangeKind
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceServicer
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import current_caller
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import node_from, node_into
from tidings.kit.pki import normalised
from tidings.kit.rpc_errors import TidingsError

log = get_logger("registry")

# Changes that may wait for one watcher; one that is slower is cut off and comes back with `since`.
MAX_WAITING = 1000

_KINDS = {
    ChangeKind.JOINED: pb.NodeChangeKind.NODE_CHANGE_KIND_JOINED,
    ChangeKind.BACK: pb.NodeChangeKind.NODE_CHANGE_KIND_BACK,
    ChangeKind.SUSPECT: pb.NodeChangeKind.NODE_CHANGE_KIND_SUSPECT,
    ChangeKind.FAILED: pb.NodeChangeKind.NODE_CHANGE_KIND_FAILED,
    ChangeKind.DRAINING: pb.NodeChangeKind.NODE_CHANGE_KIND_DRAINING,
    ChangeKind.LEFT: pb.NodeChangeKind.NODE_CHANGE_KIND_LEFT,
}
# What a node may say of itself.
_OWN_STATES = (NodeState.JOINING, NodeState.UP, NodeState.DRAINING)


class RegistryApi(RegistryServiceServicer):
    """Serves registry.v1."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        caller = current_caller(context)
        try:
            node = node_from(request.node)
        except ValueError as error:
            raise _bad(str(error)) from None
        if not node.hostname or not node.incarnation or not node.address or not node.services:
            raise _bad("`hostname`, `incarnation`, `address` and `services` must be set")
        if node.state not in _OWN_STATES:
            raise _bad("a node joins as JOINING")
        if caller.kind != "local":
            # The row's certificate is the caller's own, and so is the name in it.
            try:
                own = normalised(request.node.certificate.encode()) == caller.certificate
            except ValueError:
                own = False
            if not own:
                raise _not_allowed("the certificate of the row must be the one that the caller shows")
            if caller.name != node.hostname:
                raise _not_allowed(f"the certificate is made out to {caller.name!r}, not to {node.hostname!r}")
            if caller.kind == "joiner" and caller.services and not caller.services.issuperset(node.services):
                raise _not_allowed(f"the certificate allows the services {', '.join(sorted(caller.services))} alone")
        try:
            return pb.JoinResponse(view_version=await self._members.join(node))
        except DatabaseAway as error:
            raise _away(error) from None

    async def Beat(self, request: pb.BeatRequest, context: Any) -> pb.BeatResponse:
        self._check_own(request.hostname, request.incarnation, context)
        state = _OWN.get(request.state)
        if state is None:
            raise _bad("a node calls itself JOINING, UP or DRAINING")
        try:
            alive = await self._members.beat(
                request.hostname, request.incarnation, state, request.cpu_usage, request.mem_usage
            )
        except DatabaseAway as error:
            raise _away(error) from None
        if not alive:
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_A_MEMBER,
                f"{request.hostname} is no member under this incarnation",
            )
        return pb.BeatResponse(view_version=self._members.view.version)

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self._check_own(request.hostname, request.incarnation, context)
        try:
            await self._members.leave(request.hostname, request.incarnation)
        except DatabaseAway as error:
            raise _away(error) from None
        return pb.LeaveResponse()

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        try:
            view = await self._members.refresh()
        except DatabaseAway:
            view = self._members.view
        response = pb.ListNodesResponse(view_version=view.version)
        for node in view:
            node_into(node, response.nodes.add())
        return response

    async def WatchNodes(self, request: pb.WatchNodesRequest, context: Any) -> AsyncIterator[pb.WatchNodesResponse]:
        waiting: asyncio.Queue[pb.WatchNodesResponse | None] = asyncio.Queue(MAX_WAITING)

        def changed(change: Change, node: Node, _view: ClusterView) -> None:
            response = pb.WatchNodesResponse(view_version=change.version)
            response.change.kind = _KINDS[change.kind]
            node_into(node, response.change.node)
            try:
                waiting.put_nowait(response)
            except asyncio.QueueFull:
                log.warning("watcher_too_slow")
                unwatch()
                waiting.get_nowait()
                waiting.put_nowait(None)

        unwatch = self._members.watch(changed)
        try:
            try:
                view = await self._members.refresh()
            except DatabaseAway:
                view = self._members.view
            if request.since != view.version or not view.version:
                # What lies between is told at once, by a snapshot: shorter than all its changes.
                snapshot = pb.WatchNodesResponse(view_version=view.version)
                snapshot.snapshot.SetInParent()
                for node in view:
                    node_into(node, snapshot.snapshot.nodes.add())
                yield snapshot
            last = view.version
            while (response := await waiting.get()) is not None:
                if response.view_version > last:
                    last = response.view_version
                    yield response
        finally:
            unwatch()

    async def ReportUnreachable(
        self, request: pb.ReportUnreachableRequest, context: Any
    ) -> pb.ReportUnreachableResponse:
        if self._members.view.by_incarnation(request.incarnation) is None:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_FOUND, f"{request.hostname} is not in the view")
        log.info("reported_unreachable", node=request.hostname, observation=request.observation[:200])
        return pb.ReportUnreachableResponse()

    def _check_own(self, hostname: str, incarnation: str, context: Any) -> None:
        caller = current_caller(context)
        if caller.kind != "local" and (caller.name, caller.incarnation) != (hostname, incarnation):
            raise _not_allowed("a node speaks for itself alone")


_OWN = {2: NodeState.UP, 1: NodeState.JOINING, 5: NodeState.DRAINING}


def _bad(message: str) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, message)


def _not_allowed(message: str) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_NOT_ALLOWED, message)


def _away(error: DatabaseAway) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer")
