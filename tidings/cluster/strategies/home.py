"""`home`: an account's bare JID hashes to one router, which keeps all its sessions and decides for it.

A stanza costs one copy at most, whatever the number of routers, and nobody tells anybody about log-ins. When
the routers of the view change, the accounts of those that went, and a share for one that came, get another
home. Their sessions are handed over one by one; until a router has said that it has none left that belong
elsewhere, the new home sends it copies for the accounts whose home it was.

Whoever wants some accounts kept at some routers only derives from it and overrides `candidates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidings.cluster.hashing import rendezvous
from tidings.cluster.strategy import HERE, Context, Plan, routers
from tidings.cluster.view import ClusterView

# Plans that are remembered between two views; more are computed anew.
REMEMBERED = 100_000
# Sets of routers before the present one that are remembered; older homes have long handed over.
GENERATIONS = 4


class Home:
    """Satisfies `tidings.cluster.strategy.Strategy`."""

    def __init__(self, own: str, context: Context) -> None:
        self._own = own
        self._context = context
        # The routers that homes are picked from now: the name of each by its incarnation.
        self._routers: dict[str, str] = {}
        # The present view, and the one by which these are the routers.
        self._version = 0
        self._since = 0
        self._plans: dict[str, Plan] = {}
        # Earlier sets of routers, and who has not said yet that all its sessions are where they belong.
        self._earlier: list[dict[str, str]] = []
        self._others: set[str] = set()
        self._unsettled: set[str] = set()
        # By router: the latest view for which it has said so.
        self._settled: dict[str, int] = {}
        # Our own sessions that belong elsewhere.
        self._foreign: set[tuple[str, str]] = set()

    def view_changed(self, view: ClusterView) -> None:
        now = {node.incarnation: node.hostname for node in routers(view)}
        others = self._others = {node.incarnation for node in view.with_router_sessions()} - {self._own}
        for gone in set(self._settled) - others:
            del self._settled[gone]
        self._version = view.version
        self._plans.clear()
        if now == self._routers:
            self._unsettled &= others
            # Who has seen the routers change at a later view than we have waits for a word about that one.
            self._say_when_settled()
            return
        if self._unsettled or not self._earlier:
            self._earlier = [*self._earlier, self._routers][-GENERATIONS:]
        else:
            self._earlier = [self._routers]
        self._routers = now
        self._since = view.version
        self._unsettled = {node for node in others if self._settled.get(node, 0) < self._since}
        own = (jid.partition("/") for jid in self._context.sessions())
        self._foreign = {(account, resource) for account, _, resource in own if self.keeper(account) != self._own}
        self._say_when_settled()

    def candidates(self, account: str, routers: Mapping[str, str]) -> Sequence[str]:
        """The incarnations that an account's home is picked from: all of them, here.

        `routers`: the name of each router by its incarnation, at least one. The answer MUST depend on these two
        alone, not on the present view: it is asked for earlier sets of routers too. It MUST name at least one.
        """
        return list(routers)

    def _home(self, account: str, routers: Mapping[str, str]) -> str:
        return rendezvous(account, self.candidates(account, routers))

    def keeper(self, account: str) -> str:
        return self._home(account, self._routers) if self._routers else self._own

    def locate(self, account: str, resource: str) -> Plan:
        plan = self._plans.get(account)
        if plan is None:
            if len(self._plans) >= REMEMBERED:
                self._plans.clear()
            plan = self._plans[account] = self._plan(account)
        return plan

    def _plan(self, account: str) -> Plan:
        keeper = self.keeper(account)
        if keeper != self._own:
            return Plan(decides=keeper)
        if not self._unsettled:
            return HERE
        before = {self._home(account, earlier) for earlier in self._earlier if earlier}
        late = tuple(sorted(before & self._unsettled))
        return Plan(nodes=late, certain=False) if late else HERE

    def session_opened(self, account: str, resource: str) -> None:
        if self.keeper(account) != self._own:
            self._foreign.add((account, resource))

    def session_closed(self, account: str, resource: str) -> None:
        if (account, resource) in self._foreign:
            self._foreign.discard((account, resource))
            self._say_when_settled()

    def _say_when_settled(self) -> None:
        if not self._foreign:
            for node in sorted(self._others):
                self._context.tell(node, b"settled %d" % self._version)

    def noted(self, node: str, note: bytes) -> None:
        word, _, version = note.partition(b" ")
        if word != b"settled" or not version.isdigit():
            return
        self._settled[node] = max(self._settled.get(node, 0), int(version))
        if node in self._unsettled and self._settled[node] >= self._since:
            self._unsettled.discard(node)
            self._plans.clear()
