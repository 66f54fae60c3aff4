"""`online-users`: every router knows every session of the cluster.

A stanza costs a copy to each router that has a session of the account, and nothing where nobody is there; a
log-in costs a note to every other router. Notes are lines of text: `+` or `-` and a full JID; a line `=` says
that what was known of its sender is no longer true, and that all it has follows.
"""

from __future__ import annotations

from tidings.cluster.strategy import HERE, Context, Plan
from tidings.cluster.view import ClusterView

# Sessions in one note, when a router comes that has to be told of all: a note is to fit into a batch.
AT_ONCE = 500


class OnlineUsers:
    """Satisfies `tidings.cluster.strategy.Strategy`."""

    def __init__(self, own: str, context: Context) -> None:
        self._own = own
        self._context = context
        self._others: set[str] = set()
        # Routers by resource by account: where each session is. Several in the moment of a conflict or a move.
        self._where: dict[str, dict[str, set[str]]] = {}
        # The same by router.
        self._sessions: dict[str, set[tuple[str, str]]] = {}

    def view_changed(self, view: ClusterView) -> None:
        now = {node.incarnation for node in view.with_router_sessions()} - {self._own}
        for gone in self._others - now:
            self._forget(gone)
        come, self._others = now - self._others, now
        if come:
            lines = ["=", *(f"+{jid}" for jid in self._context.sessions())]
            for start in range(0, len(lines), AT_ONCE):
                note = "\n".join(lines[start : start + AT_ONCE]).encode()
                for node in sorted(come):
                    self._context.tell(node, note)

    def session_opened(self, account: str, resource: str) -> None:
        self._add(self._own, account, resource)
        self._tell(f"+{account}/{resource}")

    def session_closed(self, account: str, resource: str) -> None:
        self._remove(self._own, account, resource)
        self._tell(f"-{account}/{resource}")

    def _tell(self, line: str) -> None:
        for node in sorted(self._others):
            self._context.tell(node, line.encode())

    def noted(self, node: str, note: bytes) -> None:
        if node not in self._others:
            return  # it has gone, or we shall tell each other all when the view shows it
        for line in note.decode(errors="replace").split("\n"):
            if line == "=":
                self._forget(node)
                continue
            account, slash, resource = line[1:].partition("/")
            if slash and line[0] == "+":
                self._add(node, account, resource)
            elif slash and line[0] == "-":
                self._remove(node, account, resource)

    def keeper(self, account: str) -> str:
        return ""

    def locate(self, account: str, resource: str) -> Plan:
        resources = self._where.get(account)
        if resources is None:
            return HERE
        # A resource that nobody is known to have may just be coming, to whoever has others of the account or not.
        known = not resource or resource in resources
        nodes = set(resources[resource]) if resource and known else set[str]().union(*resources.values())
        here = self._own in nodes
        nodes.discard(self._own)
        return Plan(nodes=tuple(sorted(nodes)), certain=known, here=here) if nodes else HERE

    def _add(self, node: str, account: str, resource: str) -> None:
        self._where.setdefault(account, {}).setdefault(resource, set()).add(node)
        self._sessions.setdefault(node, set()).add((account, resource))

    def _remove(self, node: str, account: str, resource: str) -> None:
        resources = self._where.get(account, {})
        nodes = resources.get(resource)
        self._sessions.get(node, set()).discard((account, resource))
        if nodes is None:
            return
        nodes.discard(node)
        if not nodes:
            del resources[resource]
            if not resources:
                del self._where[account]

    def _forget(self, node: str) -> None:
        for account, resource in self._sessions.pop(node, set()).copy():
            self._remove(node, account, resource)
