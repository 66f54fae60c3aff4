"""Nodes as messages, and back."""

from __future__ import annotations

from tidings.api.common.v1.node_pb2 import Node as NodeMessage
from tidings.api.common.v1.node_pb2 import NodeState as StateMessage
from tidings.cluster.node import Node, NodeState

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


def node_from(message: NodeMessage) -> Node:
    """The node that a message describes. Raises ValueError for a state that is not known."""
    state = _FROM_MESSAGE.get(message.state)
    if state is None:
        raise ValueError("`state` must be set")
    return Node(
        hostname=message.hostname, secondary=message.secondary, address=message.address, port=message.port,
        host=message.host, incarnation=message.incarnation, beat=message.beat, services=tuple(message.services),
        state=state, version=message.version, protocol=message.protocol,
        virtual_hosts=tuple(message.virtual_hosts), strategy=message.strategy,
        started_unix_ms=message.started_unix_ms, last_update_unix_ms=message.last_update_unix_ms,
        cpu_usage=message.cpu_usage, mem_usage=message.mem_usage, certificate=message.certificate,
    )  # fmt: skip
