"""`zone`: the accounts of a virtual host are kept at routers of its own.

The names of the nodes say which routers belong to which virtual host:

    --virt-hosts=example.org,example.net
    --cluster-hostname=r1.example.org       keeps accounts of example.org
    --cluster-hostname=r2.example.org       so does this one
    --cluster-hostname=r1.example.net       keeps accounts of example.net

Reasons to want this: the accounts of a customer or a country stay on certain machines, or what floods one
virtual host does not slow the others. Clients may connect to any node all the same. A virtual host whose routers
are all away, or that has none, is kept by all the others: zones are a preference, not a wall.

Read this beside `tidings/cluster/strategy.py`, the contract that every strategy keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidings.cluster.strategies.home import Home


class Zone(Home):
    """Satisfies `tidings.cluster.strategy.Strategy`, as `Home` does.

    `Home` keeps all sessions of an account at one router, its home, which decides for the account too. A stanza
    costs one copy at most, and when routers come and go the sessions are handed over without a loss. All of that
    is wanted here as well. What differs is one question: which routers may be the home of an account?
    """

    def zone(self, account: str) -> str:
        """The zone that an account belongs to: here its virtual host. Override it for zones of another kind.

        An account is a bare JID, prepared by RFC 7622: the same account is always the same text.
        """
        return account.rpartition("@")[2]

    def candidates(self, account: str, routers: Mapping[str, str]) -> Sequence[str]:
        """The routers of the account's zone; all of them where the zone has none.

        `Home` hashes the account onto one of what this returns (rendezvous hashing), so that the accounts of a
        zone spread evenly over its routers, and few of them move when one comes or goes.

        Routers are told apart by their incarnations: a router that was started again is another one, and has no
        sessions. People name nodes, so zones go by the name.

        The rule that must not be broken: the answer depends on the arguments and on nothing else. Every router
        asks itself this question, and all of them must come to the same answer. So nothing here looks at a
        clock, at chance, at an option that may differ between nodes, or at which router it runs in. It also may
        not remember: `Home` asks about earlier sets of routers too, to find who may still have an account's
        sessions. That is why zones stand in the names of the nodes, which all routers see in the same view.
        """
        zone = self.zone(account)
        at_home = [incarnation for incarnation, name in routers.items() if name == zone or name.endswith(f".{zone}")]
        return at_home or list(routers)
