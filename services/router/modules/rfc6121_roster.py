"""RFC 6121 2: the roster."""

from __future__ import annotations

from dataclasses import replace

from lxml import etree

from services.router.rosters import Rosters, item_xml, push, removed_xml, result_xml
from services.router.store import Roster, RosterItem
from services.router.subscription import seen_by_us, sees_us
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import PRESENCE, Module, ModuleSpec, Session, Stanza, Where
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.stanza import quoteattr

QUERY = f"{{{ns.ROSTER}}}query"
ITEM = f"{{{ns.ROSTER}}}item"
GROUP = f"{{{ns.ROSTER}}}group"

# Bytes of a handle or a group (2.1.2.3, 2.1.2.6 leave the bound to the server): stops rosters from being
# used as storage.
MAX_NAME_BYTES = 1023
MAX_GROUPS = 50
# Changes that a client is told one by one; beyond it the whole roster is shorter.
MAX_PUSHES = 100


def load(module: Module) -> None:
    roster = _Roster(module)
    module.stream_feature(lambda _host: b"<ver xmlns='%b'/>" % ns.ROSTER_VERSIONING.encode())
    module.on_iq(QUERY, roster.get, types=("get",), where=(Where.ACCOUNT, Where.SERVER))
    module.on_iq(QUERY, roster.set, types=("set",), where=(Where.ACCOUNT, Where.SERVER))
    module.on_session_left(roster.session_left)
    module.on_note(roster.noted)
    module.on_account_deleted(roster.account_deleted)


MODULE = ModuleSpec("roster", load, xep="RFC 6121", version="2")


class _Roster:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._rosters = module.router.store(Rosters)

    # --- get (2.1.3, 2.6) ---

    async def get(self, iq: Stanza) -> bytes:
        session = self._own(iq)
        account = session.jid.bare
        if len(iq.payload):
            raise StanzaError("bad-request", "a request for the roster names no items")
        known = iq.payload.get("ver")
        session.interested = True
        roster = await self._rosters.of(account, self._router)
        if known:
            changed = await self._changed_since(account, known)
            if changed is not None:
                # 2.6.3: an empty result, then what has changed, as pushes.
                self._module.after(iq, lambda: self._push_all(session, roster, changed))
                return b""
        return result_xml(roster.items.values(), roster.version)

    async def _changed_since(self, account: Jid, known: str) -> list[tuple[int, str]] | None:
        if not known.isascii() or not known.isdigit() or len(known) > 18:
            return None
        changed = await self._rosters.changes(account, int(known))
        return changed if changed is not None and len(changed) <= MAX_PUSHES else None

    def _push_all(self, session: Session, roster: Roster, changed: list[tuple[int, str]]) -> None:
        for version, contact in changed:
            item = roster.items.get(contact)
            xml = item_xml(item) if item is not None and item.listed else removed_xml(contact)
            self._router.deliver(session, push(session.jid, xml, version))

    # --- set (2.1.4, 2.1.5, 2.3, 2.4, 2.5) ---

    async def set(self, iq: Stanza) -> bytes:
        session = self._own(iq)
        account = session.jid.bare
        items = [child for child in iq.payload if child.tag == ITEM]
        if len(items) != 1 or len(iq.payload) != 1:
            raise StanzaError("bad-request", "a roster set has exactly one item")
        wanted = items[0]
        try:
            contact = str(Jid.parse(wanted.get("jid", "")).bare)
        except JidError:
            raise StanzaError("bad-request", "the item's JID is none") from None
        roster = await self._rosters.of(account, self._router)
        present = roster.items.get(contact)
        if wanted.get("subscription") == "remove":
            if present is None or not present.listed:
                raise StanzaError("item-not-found")
            await self._remove(account, present)
            return b""
        name = wanted.get("name", "")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise StanzaError("not-acceptable", "the name is too long")
        groups = _groups(wanted)
        if present is None:
            most = self._module.options.for_host(account.domain, "max-roster-items")
            if most and len(roster.items) >= most:
                raise StanzaError("not-allowed", f"a roster holds at most {most} contacts")
            present = RosterItem(contact)
        # 2.1.2.5 and 2.1.2.2: what else the client says of the item is the server's to decide.
        await self._rosters.put(account, replace(present, name=name, groups=groups), self._router)
        return b""

    async def _remove(self, account: Jid, item: RosterItem) -> None:
        """2.5.2: what was subscribed is cancelled, both ways."""
        await self._rosters.remove(account, item.contact, self._router)
        if seen_by_us(item.subscription) or item.ask:
            self._send(account, item.contact, "unsubscribe")
        if sees_us(item.subscription) or item.pending_in:
            self._send(account, item.contact, "unsubscribed")
        if sees_us(item.subscription):
            for session in self._router.sessions(str(account)).values():
                if session.presence is not None:
                    self._send(session.jid, item.contact, "unavailable")
            self._router.tell("presence", str(account), b"hide " + item.contact.encode())

    def _send(self, from_: Jid, to: str, type_: str) -> None:
        raw = f"<presence from={quoteattr(str(from_))} to={quoteattr(to)} type='{type_}'/>"
        self._router.route(Envelope(kind=PRESENCE, type=type_, from_jid=str(from_), to_jid=to, stanza=raw.encode()))

    def _own(self, iq: Stanza) -> Session:
        """2.1.3, 2.3.3: a roster is its owner's alone."""
        session = iq.session
        if session is None or iq.to not in (session.jid.bare, Jid("", session.jid.domain, "")):
            raise StanzaError("forbidden")
        return session

    # --- life ---

    def session_left(self, session: Session) -> None:
        """(At the end of a session the module for presence forgets the roster, which it needs till then.)"""
        if not self._router.sessions(session.account):
            self._rosters.forget(session.account)

    async def account_deleted(self, account: Jid) -> None:
        """Contacts of an account that goes lose it, as if it had removed them (2.5.2)."""
        for item in (await self._rosters.of(account, self._router)).items.values():
            if seen_by_us(item.subscription) or item.ask:
                self._send(account, item.contact, "unsubscribe")
            if sees_us(item.subscription) or item.pending_in:
                self._send(account, item.contact, "unsubscribed")
        await self._rosters.delete(account, self._router)

    def noted(self, account: Jid, note: bytes) -> bytes:
        """Another router has changed the roster of an account that may have sessions here."""
        return self._rosters.noted(account, note, self._router)


def _groups(item: etree._Element) -> tuple[str, ...]:
    """2.3.3: no group twice, none empty, none too long."""
    groups = [child.text or "" for child in item if child.tag == GROUP]
    if len(set(groups)) != len(groups):
        raise StanzaError("bad-request", "a group is named twice")
    if any(not group for group in groups):
        raise StanzaError("not-acceptable", "a group without a name")
    if len(groups) > MAX_GROUPS or any(len(group.encode()) > MAX_NAME_BYTES for group in groups):
        raise StanzaError("not-acceptable", "too many groups, or one with too long a name")
    return tuple(groups)
