"""The contract of a strategy: the rule by which routers decide who keeps a session and where a stanza goes.

A strategy is one class, made once in each router, small and pure: it is told what happens and asked where
things are; it does no I/O, keeps no clock and starts nothing. All routers of a cluster use the same one.

Whoever writes one names it in the entry-point group `tidings.strategies` (or gives `package.module.Class` as
--sm-cluster-strategy-class) and runs the contract suite over it: `tidings.testing.strategies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView

GROUP = "tidings.strategies"


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a stanza for an account goes.

    Either another router decides what becomes of it (`decides`), or the asking one does; then `nodes` are the
    other routers that get a copy for their sessions.
    """

    # The incarnation of the router that applies the rules of the account; '' for the asking one.
    decides: str = ""
    # Incarnations of routers that may have sessions of the account. Never the asking one.
    nodes: tuple[str, ...] = ()
    # Whether `nodes` are known to have them. When not, their answers are waited for one stanza at a time:
    # that nobody answered is then no proof that nobody is there.
    certain: bool = True
    # Where several routers may have sessions of an account: whether the asking one has some that this may be
    # for. It changes nothing but that plans differ, and then what was sent by the one before is waited for.
    here: bool = False


# The asking router decides, and no other one has sessions of the account.
HERE = Plan()


class Context(Protocol):
    """All that a strategy may do."""

    def tell(self, node: str, note: bytes) -> None:
        """Sends a note to the same strategy in another router (`noted` there).

        Guaranteed: while both incarnations are in the view, notes to one router arrive in order, each once;
        and before whatever else this router sends there later. Not guaranteed: when.
        """

    def sessions(self) -> Iterable[str]:
        """The full JIDs of the sessions that this router has now."""


class Strategy(Protocol):
    """One router's side of a strategy. The constructor gets the router's own incarnation and a `Context`."""

    def view_changed(self, view: ClusterView) -> None:
        """There is a newer view. Routers with other incarnations than before are other routers: what was known
        of those that are gone MUST be forgotten."""

    def session_opened(self, account: str, resource: str) -> None:
        """This router has a session now: bound here, or taken over."""

    def session_closed(self, account: str, resource: str) -> None:
        """This router has it no longer: it ended, or was handed over."""

    def noted(self, node: str, note: bytes) -> None:
        """A note of this strategy in another router. A note that can't be read MUST be dropped silently."""

    def keeper(self, account: str) -> str:
        """The incarnation of the router that is to keep the sessions of an account; '' when any may.

        MUST depend on the account and the view alone, so that routers with the same view agree. Sessions that
        are elsewhere are handed over when the view changes.
        """

    def locate(self, account: str, resource: str) -> Plan:
        """Where a stanza for an account goes; `resource` is '' for the bare JID. Called for each stanza.

        MUST NOT name another router to decide, unless `keeper` would name the same one. MUST name every
        router in `nodes` of which it knows a session that the stanza may be for.
        """


Factory = Callable[[str, Context], Strategy]


def routers(view: ClusterView) -> list[Node]:
    """The routers that sessions may be kept at: those that serve, a suspect one until it has failed."""
    return [node for node in view.with_service("router") if node.state in (NodeState.UP, NodeState.SUSPECT)]
