"""The rosters of those who are here: a cache over the store, and the pushes that tell clients of changes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from services.router.store import Roster, RosterItem, RosterStore
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, RouterPort
from tidings.xmpp import ns
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import attribute, escape_text, quoteattr

# The module whose notes tell other routers of changes.
NOTES_OF = "roster"


class Rosters:
    """Shared by the modules for rosters and for presence."""

    def __init__(self, store: RosterStore) -> None:
        self._store = store
        # Raised when another router has changed a roster: what was being read then may be old.
        self._changes = 0
        # Rosters of accounts that have sessions here.
        self._cached: dict[str, Roster] = {}

    async def of(self, account: Jid, router: RouterPort) -> Roster:
        """An account's roster; kept in memory while it has sessions here."""
        key = str(account)
        cached = self._cached.get(key)
        if cached is not None:
            return cached
        changes = self._changes
        roster = await self._store.load(account)
        if router.sessions(key) and changes == self._changes:
            return self._cached.setdefault(key, roster)
        return roster

    def has(self, account: str, contact: str) -> bool | None:
        """Whether a contact is in an account's roster; None when that is not known here now."""
        roster = self._cached.get(account)
        if roster is None:
            return None
        item = roster.items.get(contact)
        return item is not None and item.listed

    def forget(self, account: str) -> None:
        """The account has no session here any more, or its roster is gone."""
        self._cached.pop(account, None)

    async def changes(self, account: Jid, since: int) -> list[tuple[int, str]] | None:
        return await self._store.changes(account, since)

    async def put(self, account: Jid, item: RosterItem, router: RouterPort, push: bool = True) -> None:
        """Writes an item and tells the account's clients."""
        version = await self._store.put(account, item)
        roster = self._cached.get(str(account))
        if roster is not None:
            roster.version = max(roster.version, version)
            roster.items[item.contact] = item
        self._changed(account, item_xml(item) if push and item.listed else "", version, router)

    async def remove(self, account: Jid, contact: str, router: RouterPort, push: bool = True) -> None:
        version = await self._store.remove(account, contact)
        roster = self._cached.get(str(account))
        if roster is not None:
            roster.version = max(roster.version, version)
            roster.items.pop(contact, None)
        self._changed(account, removed_xml(contact) if push else "", version, router)

    async def delete(self, account: Jid, router: RouterPort) -> None:
        await self._store.delete_all(account)
        self.forget(str(account))
        router.tell(NOTES_OF, str(account), b"0 ")

    def _changed(self, account: Jid, item: str, version: int, router: RouterPort) -> None:
        """Pushes a change (`item`, '' when clients are not told) here, and has the other routers do it too."""
        router.tell(NOTES_OF, str(account), f"{version} {item}".encode())
        if item:
            self._push(account, item, version, router)

    def noted(self, account: Jid, note: bytes, router: RouterPort) -> bytes:
        """Another router has changed a roster: `note` is the version and the changed item."""
        self._changes += 1
        self.forget(str(account))
        version, _, item = note.decode().partition(" ")
        if item:
            self._push(account, item, int(version), router)
        return b""

    def _push(self, account: Jid, item: str, version: int, router: RouterPort) -> None:
        """RFC 6121 2.1.6: to every session that asked for the roster."""
        for session in list(router.sessions(str(account)).values()):
            if session.interested:
                router.deliver(session, push(session.jid, item, version))


def push(to: Jid, item: str, version: int) -> Envelope:
    """A roster push (RFC 6121 2.1.6, 2.6.3)."""
    id_ = f"push-{secrets.token_hex(6)}"
    raw = (
        f"<iq type='set' id='{id_}' to={quoteattr(str(to))}>"
        f"<query xmlns='{ns.ROSTER}' ver='{version}'>{item}</query></iq>"
    )
    return Envelope(kind=IQ, type="set", id=id_, to_jid=str(to), stanza=raw.encode())


def item_xml(item: RosterItem) -> str:
    """RFC 6121 2.1.2."""
    groups = "".join(f"<group>{escape_text(group)}</group>" for group in item.groups)
    ask = " ask='subscribe'" if item.ask else ""
    approved = " approved='true'" if item.approved else ""
    return (
        f"<item jid={quoteattr(item.contact)}{attribute('name', item.name)} subscription='{item.subscription}'"
        f"{ask}{approved}>{groups}</item>"
    )


def removed_xml(contact: str) -> str:
    return f"<item jid={quoteattr(contact)} subscription='remove'/>"


def result_xml(items: Iterable[RosterItem], version: int) -> bytes:
    """The whole roster, as a client gets it."""
    listed = "".join(item_xml(item) for item in items if item.listed)
    return f"<query xmlns='{ns.ROSTER}' ver='{version}'>{listed}</query>".encode()
