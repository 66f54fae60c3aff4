"""Where the router keeps accounts, rosters and sessions: the ports, and what implementations must do. Messages have
ports of their own (messages.py).

Every method is atomic and may raise DatabaseAway: then it may or may not have happened, and may be repeated.
Parts of JIDs are prepared (RFC 7622) by the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tidings.xmpp.jid import Jid
from tidings.xmpp.sasl import ScramKeys


class AccountExists(Exception):
    """There is an account of that name."""


class AccountRow(NamedTuple):
    """An account in a list."""

    jid: str
    created_unix_ms: int


class AccountStore(Protocol):
    """The accounts of the virtual hosts, with the keys of their passwords by hash ("SHA-256")."""

    async def create(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        """Raises AccountExists; of several at once exactly one succeeds."""

    async def keys(self, host: str, local: str, hash_name: str) -> ScramKeys | None: ...

    async def set_keys(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        """Replaces the keys of an account that exists; nothing happens when it does not."""

    async def delete(self, host: str, local: str) -> None: ...

    async def exists(self, host: str, local: str) -> bool: ...

    async def page(self, host: str | None, after: str, limit: int) -> list[AccountRow]:
        """Accounts by JID, those after a JID; of one host, or of all."""

    async def shared_key(self, name: str) -> bytes:
        """32 random bytes, made by whoever asks first: MUST be the same on every router, for ever.

        "fake-salt-key" is for the salts of names without account, "ticket-key" seals tickets.
        """


@dataclass(frozen=True, slots=True)
class RosterItem:
    """One contact (RFC 6121 2.1.2), and what is pending with it (Appendix A)."""

    contact: str
    name: str = ""
    groups: tuple[str, ...] = ()
    # "none", "to", "from" or "both".
    subscription: str = "none"
    # We asked to see the contact's presence, and have no answer.
    ask: bool = False
    # The contact asked to see ours: the stanza that did, kept until it is answered (3.1.3).
    pending_in: bytes = b""
    # The user has approved a request that has not come yet (3.4).
    approved: bool = False

    @property
    def listed(self) -> bool:
        """Whether clients see it: a request from a stranger alone makes no roster item (3.1.3)."""
        return (
            self.ask
            or self.subscription != "none"
            or self.approved
            or not self.pending_in
            or bool(self.name or self.groups)
        )


@dataclass(slots=True)
class Roster:
    """All contacts of an account, by their bare JIDs. The version grows with each change."""

    version: int = 0
    items: dict[str, RosterItem] = field(default_factory=dict)


class RosterStore(Protocol):
    """The rosters. Changes of different items MUST NOT undo each other, whichever routers make them."""

    async def load(self, account: Jid) -> Roster:
        """The roster; an empty one where there is none."""

    async def put(self, account: Jid, item: RosterItem) -> int:
        """Writes an item, new or changed. Returns the roster's version."""

    async def remove(self, account: Jid, contact: str) -> int:
        """Removes an item, if it is there. Returns the roster's version."""

    async def changes(self, account: Jid, since: int) -> list[tuple[int, str]] | None:
        """Who changed after a version, each with its last version, oldest first; None: that is not known."""

    async def delete_all(self, account: Jid) -> None: ...


@dataclass(frozen=True, slots=True)
class SessionRow:
    """Who owns a full JID: one row of the table `sessions`."""

    jid: Jid
    session: str
    # Raised by whoever takes the session over; who acts under an older one is refused.
    epoch: int
    # The incarnation of the router that owns it.
    router: str
    # Whether contacts may have seen it available: from bind on, until it is known that they have not.
    available: bool = True
    # Whom it sent presence directly (RFC 6121 4.6), sorted; only `bind` and `end` tell it.
    directed: tuple[str, ...] = ()


class DirectedChange(NamedTuple):
    """To whom else a session has sent presence directly, and to whom it no longer counts."""

    jid: Jid
    session: str
    epoch: int
    added: Collection[str]
    # None: all but those of `added`.
    removed: Collection[str] | None = ()


class SessionTable(Protocol):
    """Who owns which full JID: the one truth of the cluster. Every change is a compare-and-set.

    A row is there from bind to the end of its session. Implementations MUST let exactly one of several callers
    win, whichever routers they are. Who repeats a bind, a replacement or a move because nobody could tell what had
    become of it MUST be told that it is done, where it is.
    """

    async def bind(self, jid: Jid, session: str, router: str) -> SessionRow | None:
        """Enters a session. Returns None when it is entered, else the row that is in the way."""

    async def replace(self, row: SessionRow, session: str, router: str) -> bool:
        """Puts a new session in the place of a row, if that is still as given. Its epoch is one higher."""

    async def move(self, row: SessionRow, router: str) -> bool:
        """Gives a session to another router under the next epoch, if its row is still as given (but for
        `available`). To the one that has it already: then nobody can move it by the old epoch any more."""

    async def end(self, jid: Jid, session: str, epoch: int) -> SessionRow | None:
        """Removes a session, if its row still has this epoch. Returns the row that was removed."""

    async def set_directed(self, changes: Sequence[DirectedChange]) -> None:
        """Notes to whom sessions have sent presence directly. It goes with the session from router to router, and is
        gone when it is ended or replaced: what the same router writes meanwhile comes before, or is not written."""

    async def set_available(self, changes: Sequence[tuple[Jid, str, int, bool]]) -> None:
        """Notes of sessions (full JID, session id, epoch) whether they may have been seen available."""

    async def of_account(self, account: Jid) -> list[SessionRow]: ...

    async def of_router(self, router: str) -> list[SessionRow]: ...

    async def ids_of_router(self, router: str) -> set[str]:
        """The sessions of a router: the same without what else is known of them, so that many are cheap."""
        ...

    async def routers(self) -> dict[str, int]:
        """The incarnations that own sessions, and how many."""
