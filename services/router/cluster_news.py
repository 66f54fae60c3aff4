"""Tells administrators who are online what happens to the cluster's nodes, as a chat message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.module import MESSAGE
from tidings.xmpp.stanza import escape_text, quoteattr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from services.router.deliveries import Deliveries
    from services.router.sessions import Sessions


class ClusterNews:
    """Each router tells the administrators' sessions that it has, so each session is told once."""

    def __init__(self, sessions: Sessions, deliveries: Deliveries, admins: Callable[[], Iterable[str]]) -> None:
        self._sessions = sessions
        self._deliveries = deliveries
        # The bare JIDs of the administrators.
        self._admins = admins
        self._before: ClusterView | None = None

    def view_changed(self, view: ClusterView) -> None:
        before, self._before = self._before, view
        if before is None or not before.version:
            return
        for line in changes(before, view):
            self._tell(line)

    def _tell(self, line: str) -> None:
        for admin in self._admins():
            for session in list(self._sessions.of(admin).values()):
                if session.presence is None or session.priority < 0:
                    continue
                raw = (
                    f"<message type='chat' from={quoteattr(session.jid.domain)} to={quoteattr(session.jid_text)}>"
                    f"<body>{escape_text(line)}</body></message>"
                ).encode()
                envelope = Envelope(
                    kind=MESSAGE, type="chat", from_jid=session.jid.domain, to_jid=session.jid_text, stanza=raw
                )
                self._deliveries.to_session(session, envelope)


# What is worth a message, by the state that a node is in now.
_SENTENCES = {
    NodeState.UP: "Node {} is up.",
    NodeState.SUSPECT: "Node {} has gone silent.",
    NodeState.FAILED: "Node {} has failed.",
    NodeState.DRAINING: "Node {} drains.",
}


def changes(before: ClusterView, now: ClusterView) -> list[str]:
    """What has happened between two views, one sentence each."""
    lines = []
    for node in now:
        earlier = before.by_incarnation(node.incarnation)
        if (earlier is None or earlier.state is not node.state) and node.state in _SENTENCES:
            lines.append(_SENTENCES[node.state].format(node.hostname))
    for node in before:
        if now.by_incarnation(node.incarnation) is None and node.state is not NodeState.FAILED:
            lines.append(f"Node {node.hostname} has left.")
    return lines
