"""RegistryService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from services.registry.members import Members
from services.registry.store import Change, ChangeKind, after
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.node_pb2 import (
    NODE_STATE_DRAINING,
    NODE_STATE_FAILED,
    NODE_STATE_JOINING,
    NODE_STATE_UP,
)
from tidings.api.node.v1.node_pb2 import DrainRequest
from tidings.api.node.v1.node_pb2_grpc import NodeServiceStub
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceServicer
from tidings.cluster.node import Node, NodeState, is_host
from tidings.cluster.view import ClusterView
from tidings.kit.channel import Channels
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import current_caller
from tidings.kit.logging import get_logger
from tidings.kit.node_messages import node_from, node_into
from tidings.kit.pki import normalised
from tidings.kit.rpc_errors import TidingsError, describe

log = get_logger("registry")

# Changes that may wait for one watcher; one that is slower is cut off and comes back with `since`.
MAX_WAITING = 1000
# Seconds for a node to take the order to drain.
DRAIN_TIMEOUT = 5.0

_KINDS = {
    ChangeKind.JOINED: pb.NodeChangeKind.NODE_CHANGE_KIND_JOINED,
    ChangeKind.BACK: pb.NodeChangeKind.NODE_CHANGE_KIND_BACK,
    ChangeKind.SUSPECT: pb.NodeChangeKind.NODE_CHANGE_KIND_SUSPECT,
    ChangeKind.FAILED: pb.NodeChangeKind.NODE_CHANGE_KIND_FAILED,
    ChangeKind.DRAINING: pb.NodeChangeKind.NODE_CHANGE_KIND_DRAINING,
    ChangeKind.LEFT: pb.NodeChangeKind.NODE_CHANGE_KIND_LEFT,
}
# What a node may say of itself.
_OWN_STATES = {
    NODE_STATE_JOINING: NodeState.JOINING,
    NODE_STATE_UP: NodeState.UP,
    NODE_STATE_DRAINING: NodeState.DRAINING,
}


class RegistryApi(RegistryServiceServicer):
    """Serves registry.v1."""

    def __init__(self, members: Members, channels: Channels) -> None:
        self._members = members
        self._channels = channels

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        caller = current_caller(context)
        try:
            node = node_from(request.node)
        except ValueError as error:
            raise _bad(str(error)) from None
        node = replace(node, hostname=_name(node.hostname))
        if not node.incarnation or not node.services:
            raise _bad("`incarnation` and `services` must be set")
        if not is_host(node.hostname) or not is_host(node.address):
            raise _bad("`hostname` must be a host name, and `address` one or an IP address")
        if not 0 < node.port < 65536:
            raise _bad("`port` must be from 1 to 65535")
        if node.state is not NodeState.JOINING:
            raise _bad("a node joins as JOINING")
        if caller.kind != "local":
            # The row's certificate is the caller's own, and so is the name in it.
            try:
                own = normalised(request.node.certificate.encode()) == caller.certificate
            except ValueError:
                own = False
            if not own:
                raise _not_allowed("the certificate of the row must be the one that the caller shows")
            if _name(caller.name) != node.hostname:
                raise _not_allowed(f"the certificate is made out to {caller.name!r}, not to {node.hostname!r}")
            if caller.may_run and not caller.may_run.issuperset(node.services):
                raise _not_allowed(f"the certificate allows the services {', '.join(sorted(caller.may_run))} alone")
            # What stands around it would become a root of all.
            node = replace(node, certificate=caller.certificate)
        try:
            return pb.JoinResponse(view_version=await self._members.join(node))
        except DatabaseAway:
            raise _away() from None

    async def Beat(self, request: pb.BeatRequest, context: Any) -> pb.BeatResponse:
        self._check_own(request.hostname, request.incarnation, context)
        state = _OWN_STATES.get(request.state)
        if state is None:
            raise _bad("a node calls itself JOINING, UP or DRAINING")
        try:
            alive = await self._members.beat(
                _name(request.hostname),
                request.incarnation,
                state,
                request.cpu_usage,
                request.mem_usage,
                request.cleaned_through,
                tuple(request.unreachable),
            )
        except DatabaseAway:
            raise _away() from None
        if not alive:
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_A_MEMBER,
                f"{request.hostname} is no member under this incarnation",
            )
        return pb.BeatResponse(view_version=self._members.view.version)

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        self._check_own(request.hostname, request.incarnation, context)
        try:
            await self._members.leave(_name(request.hostname), request.incarnation)
        except DatabaseAway:
            raise _away() from None
        return pb.LeaveResponse()

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        view, _ = await self._members.latest()
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
                over()

        def over() -> None:
            # What is left out here comes again, when the caller comes again.
            unwatch()
            while not waiting.empty():
                waiting.get_nowait()
            waiting.put_nowait(None)

        unwatch = self._members.watch(changed, over)
        try:
            view, read = await self._members.latest()
            if not read and request.since > view.version:
                raise _away()  # another registry may know more
            missed = await self._missed(request.since, view, read)
            for response in missed or ():
                yield response
            if missed is None:
                snapshot = pb.WatchNodesResponse(view_version=view.version)
                snapshot.snapshot.SetInParent()
                for node in view:
                    node_into(node, snapshot.snapshot.nodes.add())
                yield snapshot
            last = view.version
            while (news := await waiting.get()) is not None:
                if news.view_version > last:
                    last = news.view_version
                    yield news
        finally:
            unwatch()

    async def _missed(self, since: int, view: ClusterView, read: bool) -> list[pb.WatchNodesResponse] | None:
        """The changes behind a version; None when they are not all known, or the caller has nothing yet. `read`: the
        database answers."""
        if since and since == view.version:
            return []
        if not since or since > view.version or not read:
            return None
        try:
            changes = await self._members.changes(since)
        except DatabaseAway:
            return None
        if changes is None:
            return None
        missed = []
        for change in changes:
            if change.version > view.version:
                break
            response = pb.WatchNodesResponse(view_version=change.version)
            response.change.kind = _KINDS[change.kind]
            node = view.by_incarnation(change.incarnation)
            if node is not None:
                node_into(after(change, node), response.change.node)
            elif change.kind not in (ChangeKind.LEFT, ChangeKind.FAILED):
                continue  # it has gone again meanwhile, as a later change says
            else:
                response.change.node.hostname = change.hostname
                response.change.node.incarnation = change.incarnation
                response.change.node.state = NODE_STATE_FAILED
            missed.append(response)
        return missed

    async def ReportUnreachable(
        self, request: pb.ReportUnreachableRequest, context: Any
    ) -> pb.ReportUnreachableResponse:
        node = self._node(request.hostname, request.incarnation)
        reporter = current_caller(context)
        log.debug(
            "reported_unreachable",
            node=request.hostname,
            by=reporter.name,
            observation=request.observation[:200],
        )
        await self._members.look_soon(node, reporter.incarnation, request.refused)
        return pb.ReportUnreachableResponse()

    async def CheckReached(self, request: pb.CheckReachedRequest, context: Any) -> pb.CheckReachedResponse:
        self._check_own(request.hostname, request.incarnation, context)
        node = self._node(request.hostname, request.incarnation)
        return pb.CheckReachedResponse(not_by=await self._members.not_reached_by(node))

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:
        view, _ = await self._members.latest()
        node = view.node(_name(request.hostname))
        if node is None or node.state is NodeState.FAILED:
            known = ", ".join(other.hostname for other in view)
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_FOUND, f"there is no node {request.hostname!r}; there are {known}"
            )
        stub: Any = NodeServiceStub(self._channels.to(node))
        try:
            await stub.Drain(DrainRequest(asked_by=current_caller(context).name), timeout=DRAIN_TIMEOUT)
        except grpc.RpcError as error:
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_SERVING,
                f"{node.hostname} does not answer at {node.address}:{node.port}: {describe(error)}",
            ) from None
        return pb.DrainNodeResponse(incarnation=node.incarnation)

    def _node(self, hostname: str, incarnation: str) -> Node:
        node = self._members.view.by_incarnation(incarnation)
        if node is None:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_FOUND, f"{hostname} is not in the view")
        return node

    def _check_own(self, hostname: str, incarnation: str, context: Any) -> None:
        caller = current_caller(context)
        if caller.kind == "local":
            return
        # Who has failed, or left, is nobody yet, and must be told so.
        if _name(caller.name) != _name(hostname) or caller.incarnation not in ("", incarnation):
            raise _not_allowed("a node speaks for itself alone")


def _name(hostname: str) -> str:
    """A name as it stands in the table: MySQL compares names without case, and so must everybody."""
    return hostname.lower()


def _bad(message: str) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, message)


def _not_allowed(message: str) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_NOT_ALLOWED, message)


def _away() -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer")
