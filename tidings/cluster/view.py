"""A view: who is in the cluster, at one version. Immutable; a change makes a new one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tidings.cluster.node import Node, NodeState


class ClusterView:
    """The nodes of one version, by name. The lowest version is 0: nothing is known yet."""

    __slots__ = ("_by_certificate", "_by_incarnation", "_by_name", "version")

    def __init__(self, version: int = 0, nodes: Iterable[Node] = ()) -> None:
        self.version = version
        self._by_name = {node.hostname: node for node in sorted(nodes, key=lambda node: node.hostname)}
        self._by_incarnation = {node.incarnation: node for node in self._by_name.values()}
        self._by_certificate = {node.certificate: node for node in self._by_name.values() if node.certificate}

    def __iter__(self) -> Iterator[Node]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def node(self, name: str) -> Node | None:
        return self._by_name.get(name)

    def by_incarnation(self, incarnation: str) -> Node | None:
        return self._by_incarnation.get(incarnation)

    def by_certificate(self, certificate: str) -> Node | None:
        """The node whose row holds exactly this certificate (PEM)."""
        return self._by_certificate.get(certificate)

    def with_service(self, service: str) -> list[Node]:
        """The nodes that run a service, by name."""
        return [node for node in self if service in node.services]

    def living_routers(self) -> list[Node]:
        """The routers that may say something: all but those that have failed."""
        return [node for node in self.with_service("router") if node.state is not NodeState.FAILED]

    def with_router_sessions(self) -> list[Node]:
        """The routers that may have sessions: all but those that have failed, and those that do not serve yet."""
        return [
            node for node in self.with_service("router") if node.state not in (NodeState.FAILED, NodeState.JOINING)
        ]

    def with_node(self, version: int, node: Node) -> ClusterView:
        """The view in which this node is new, or as it is now."""
        return ClusterView(version, [*(other for other in self if other.hostname != node.hostname), node])

    def without(self, version: int, node: Node) -> ClusterView:
        """The view without this start of a node; another start under its name stays."""
        return ClusterView(version, [other for other in self if other.incarnation != node.incarnation])
