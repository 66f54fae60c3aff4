"""Nodes and changes of them as messages, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tidings.api.common.v1.node_pb2 import Node as NodeMessage
from tidings.api.common.v1.node_pb2 import NodeState as StateMessage
from tidings.api.registry.v1.registry_pb2 import NodeChangeKind, WatchNodesResponse
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.logging import get_logger

log = get_logger("cluster")

_TO_MESSAGE = {
    NodeState.JOINING: StateMessage.NODE_STATE_JOINING,
    NodeState.UP: StateMessage.NODE_STATE_UP,
    NodeState.SUSPECT: StateMessage.NODE_STATE_SUSPECT,
    NodeState.FAILED: StateMessage.NODE_STATE_FAILED,
    NodeState.DRAINING: StateMessage.NODE_STATE_DRAINING,
}
_FROM_MESSAGE = {message: state for state, message in _TO_MESSAGE.items()}


def state_message(state: NodeState) -> StateMessage.ValueType:
    return _TO_MESSAGE[state]


def node_into(node: Node, message: NodeMessage) -> None:
    """Writes a node into a message."""
    message.hostname = node.hostname
    message.secondary = node.secondary
    message.address = node.address
    message.port = node.port
    message.host = node.host
    message.incarnation = node.incarnation
    message.beat = node.beat
    message.services.extend(node.services)
    message.state = _TO_MESSAGE[node.state]
    message.version = node.version
    message.protocol = node.protocol
    message.virtual_hosts.extend(node.virtual_hosts)
    message.strategy = node.strategy
    message.started_unix_ms = node.started_unix_ms
    message.last_update_unix_ms = node.last_update_unix_ms
    message.cpu_usage = node.cpu_usage
    message.mem_usage = node.mem_usage
    message.certificate = node.certificate
    message.unreachable.extend(node.unreachable)
    message.joined_version = node.joined


def node_from(message: NodeMessage) -> Node:
    """The node that a message describes. A state that only a newer release knows is taken for SUSPECT: it is there,
    and nobody should count on it. Raises ValueError where there is no state."""
    if message.state == StateMessage.NODE_STATE_UNSPECIFIED:
        raise ValueError("`state` must be set")
    state = _FROM_MESSAGE.get(message.state)
    if state is None:
        state = NodeState.SUSPECT
        log.debug("unknown_state", node=message.hostname, state=message.state)
    return Node(
        hostname=message.hostname, secondary=message.secondary, address=message.address, port=message.port,
        host=message.host, incarnation=message.incarnation, beat=message.beat, services=tuple(message.services),
        state=state, version=message.version, protocol=message.protocol,
        virtual_hosts=tuple(message.virtual_hosts), strategy=message.strategy,
        started_unix_ms=message.started_unix_ms, last_update_unix_ms=message.last_update_unix_ms,
        cpu_usage=message.cpu_usage, mem_usage=message.mem_usage, certificate=message.certificate,
        unreachable=tuple(message.unreachable), joined=message.joined_version,
    )  # fmt: skip


def view_after(view: ClusterView, update: WatchNodesResponse) -> ClusterView:
    """What becomes of a view by what a registry tells. A kind of change that only a newer release knows is taken for
    what it shows: the node as it is now."""
    version = update.view_version
    if update.HasField("snapshot"):
        return ClusterView(version, _with_state(update.snapshot.nodes))
    kind = update.change.kind
    for node in _with_state([update.change.node]):
        log.debug("node_changed", node=node.hostname, change=_name(kind), view=version)
        if kind == NodeChangeKind.NODE_CHANGE_KIND_LEFT:
            return view.without(version, node)
        if kind != NodeChangeKind.NODE_CHANGE_KIND_FAILED:
            return view.with_node(version, node)
        present = view.node(node.hostname)
        if present is None or present.incarnation == node.incarnation:
            return view.with_node(version, replace(node, state=NodeState.FAILED))
    return ClusterView(version, view)


def _with_state(messages: Iterable[NodeMessage]) -> Iterator[Node]:
    for message in messages:
        try:
            yield node_from(message)
        except ValueError as error:
            log.warning("node_ignored", node=message.hostname, reason=str(error))


def _name(kind: NodeChangeKind.ValueType) -> str:
    return NodeChangeKind.Name(kind) if kind in NodeChangeKind.values() else str(kind)
