"""RFC 6121 3 and 4: presence subscriptions and presence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

from services.router.rosters import Rosters
from services.router.store import Roster, RosterItem
from services.router.subscription import INBOUND, OUTBOUND, TYPES, State, answered, seen_by_us, sees_us
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.db import DatabaseAway
from tidings.kit.module import PRESENCE, Module, ModuleSpec, Session, Stanza
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import quoteattr, to_bytes

# Whom one session may have sent presence directly: stops the list from becoming storage.
MAX_DIRECTED = 1000
# Probes that wait for sessions of dead routers; further ones are answered by what is known.
MAX_WAITING = 10_000
# Seconds between two tries while the database is away.
RETRY = 1.0


def load(module: Module) -> None:
    presence = _Presence(module)
    module.stream_feature(lambda _host: b"<sub xmlns='%b'/>" % ns.PRE_APPROVAL.encode())
    module.on_sent(PRESENCE, presence.sent)
    module.on_received(PRESENCE, presence.received)
    module.on_session_ended(presence.ended)
    module.on_note(presence.noted)


MODULE = ModuleSpec("presence", load, xep="RFC 6121", version="3-4", needs=("roster",))


class _Presence:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._router = module.router
        self._rosters = module.router.store(Rosters)
        # Probes that wait for sessions of dead routers.
        self._waiting = 0
        # Sessions whose first presence nobody has been told of, because the database is away.
        self._untold: set[str] = set()

    # --- what sessions send ---

    def sent(self, stanza: Stanza) -> bool | Awaitable[bool]:
        session = stanza.session
        if session is None:
            return False
        type_ = stanza.type
        if stanza.envelope.to_jid:
            if type_ in TYPES:
                return self._subscription(session, stanza)
            if type_ in ("", "unavailable"):
                self._directed(session, stanza)
            return False
        if type_ == "":
            return self._available(session, stanza)
        if type_ == "unavailable":
            return self._unavailable(session, stanza.raw)
        if type_ == "error":
            return True
        # 3.1.1 and so on: these are for somebody.
        raise StanzaError("bad-request", f"presence of type {type_} needs a `to`")

    async def _available(self, session: Session, stanza: Stanza) -> bool:
        """4.2 initial presence, 4.4 later presence."""
        priority, raw = _priority(stanza), stanza.raw
        initial = session.presence is None or session.id in self._untold
        rises = priority >= 0 and (initial or session.priority < 0)
        if rises:
            # From here on messages to the account are its own: they wait for those that were stored before.
            self._router.hold(session)
        try:
            session.presence, session.priority = raw, priority
            if not await self._told(session, raw, initial, rises):
                if initial:
                    self._untold.add(session.id)
                self._router.in_background(
                    self._tell_later(session, raw, initial, rises), "presence while the database is away"
                )
        finally:
            if rises:
                self._router.release(session)
        return True

    async def _tell_later(self, session: Session, raw: bytes, initial: bool, rises: bool) -> None:
        """The client has done its part; it gets what is stored, and its contacts hear of it, as soon as can be."""
        while session.presence is raw and session in self._router.sessions(session.account).values():
            await asyncio.sleep(RETRY)
            if await self._told(session, raw, initial, rises):
                return

    async def _told(self, session: Session, raw: bytes, initial: bool, rises: bool) -> bool:
        """Tells the contacts of a session, and the modules; False while the database is away."""
        try:
            roster = await self._rosters.of(session.jid.bare, self._router)
        except DatabaseAway:
            return False
        if session.presence is not raw:
            return True  # it has ended meanwhile, and whoever is to know has been told; or other presence is told
        self._untold.discard(session.id)
        self._broadcast(session, roster, raw, "")
        self._module.announce_presence(session, raw, "")
        if initial:
            for other in list(self._router.sessions(session.account).values()):
                if other is not session and other.presence is not None:
                    self._to_session(session, other.jid, other.presence, "")
            self._module.tell(session.account, b"show " + str(session.jid).encode())
            for item in roster.items.values():
                if seen_by_us(item.subscription):
                    # 4.2.2, 4.3.1: a probe on behalf of the new session.
                    self._route(session.jid, item.contact, "probe")
                if item.pending_in:
                    # 3.1.3: requests that are not answered yet, at each log-in.
                    self._router.deliver(session, Envelope(kind=PRESENCE, type="subscribe", stanza=item.pending_in))
        if rises:
            await self._module.announce_available(session)
        return True

    async def _unavailable(self, session: Session, raw: bytes) -> bool:
        """4.5.2: to all who could see the session, and once."""
        if session.presence is None and not session.directed:
            return True
        roster = await self._rosters.of(session.jid.bare, self._router)
        directed = session.directed
        self._end(session, roster, raw)
        if directed:
            self._module.announce_directed(session, "")
        return True

    def _end(self, session: Session, roster: Roster, raw: bytes) -> None:
        was_available, session.presence = session.presence is not None, None
        directed, session.directed = session.directed, set()
        if was_available:
            self._broadcast(session, roster, raw, "unavailable")
            self._module.announce_presence(session, raw, "unavailable")
        # 4.6.3: whom the broadcast does not reach.
        for jid in directed:
            item = roster.items.get(str(Jid.parse(jid).bare))
            if not was_available or item is None or not sees_us(item.subscription):
                self._route(session.jid, jid, "unavailable", raw)

    async def ended(self, session: Session, was_available: bool) -> None:
        """4.5.2: the server says it for a session that could not; called again when the database was away."""
        self._untold.discard(session.id)
        successor = self._router.sessions(session.account).get(session.jid.resource)
        seen = successor is not None and successor.presence is not None
        if (was_available or session.directed) and not seen:
            roster = await self._rosters.of(session.jid.bare, self._router)
            raw = f"<presence from={quoteattr(str(session.jid))} type='unavailable'/>".encode()
            self._end(session, roster, raw)
        if not self._router.sessions(session.account):
            # Not before this, which needs it.
            self._rosters.forget(session.account)

    def _directed(self, session: Session, stanza: Stanza) -> None:
        """4.6: remembered, so that the receiver is told of the end."""
        to = str(stanza.to)
        available = stanza.type == ""
        if (to in session.directed) is available:
            return
        if not available:
            session.directed.discard(to)
        elif len(session.directed) < MAX_DIRECTED:
            session.directed.add(to)
        else:
            raise StanzaError("policy-violation", "presence was sent directly to too many")
        self._module.announce_directed(session, to)

    def _broadcast(self, session: Session, roster: Roster, raw: bytes, type_: str) -> None:
        """4.2.2, 4.4.2, 4.5.2: to the contacts that may see it, and to the account's own sessions."""
        for item in roster.items.values():
            if sees_us(item.subscription):
                self._route(session.jid, item.contact, type_, raw, origin=session.id)
        for other in list(self._router.sessions(session.account).values()):
            if other.presence is not None or other is session:
                self._to_session(other, session.jid, raw, type_)
        own = Envelope(type=type_, from_jid=str(session.jid), stanza=raw)
        self._module.tell(session.account, b"own " + own.SerializeToString())

    # --- subscriptions that the user changes ---

    async def _subscription(self, session: Session, stanza: Stanza) -> bool:
        """3.1.2, 3.2.2, 3.3.2: by the table; the contact is always a bare JID (3.1.1)."""
        account, contact = session.jid.bare, stanza.to.bare
        type_ = stanza.type
        if contact == account:
            raise StanzaError("not-allowed", "nobody subscribes to themselves")
        roster = await self._rosters.of(account, self._router)
        item = roster.items.get(str(contact)) or RosterItem(str(contact))
        if str(contact) not in roster.items and type_ == "subscribe":
            most = self._module.options.for_host(account.domain, "max-roster-items")
            if most and len(roster.items) >= most:
                raise StanzaError("not-allowed", f"a roster holds at most {most} contacts")
        before = _state(item)
        step = OUTBOUND[type_, before]
        changed = _changed(item, step.state)
        if type_ == "subscribed":
            if not step.passed and not answered(before):
                changed = replace(changed, approved=True)  # 3.4.2: approved before it was asked
            elif step.passed:
                changed = replace(changed, approved=False)
        elif type_ == "unsubscribed":
            changed = replace(changed, approved=False)
        await self._write(account, item, changed)
        if step.passed:
            tree = stanza.tree
            tree.set("from", str(account))
            tree.set("to", str(contact))
            self._route(account, str(contact), type_, to_bytes(tree), stamped=True)
        if type_ == "subscribed" and step.passed:
            self._tell_presence(account, contact)
        elif type_ == "unsubscribed" and sees_us(before.subscription):
            self._tell_unavailable(account, contact)
        return True

    # --- what comes for accounts ---

    def received(self, stanza: Stanza) -> bool | Awaitable[bool]:
        if stanza.type in TYPES:
            return self._subscription_received(stanza)
        if stanza.type == "probe":
            return self._probe(stanza)
        return False

    async def _subscription_received(self, stanza: Stanza) -> bool:
        """3.1.3, 3.2.3, 3.3.3: by the table."""
        account, contact = stanza.to.bare, stanza.from_.bare
        type_ = stanza.type
        if not await self._router.account_exists(account):
            return True
        roster = await self._rosters.of(account, self._router)
        item = roster.items.get(str(contact)) or RosterItem(str(contact))
        before = _state(item)
        if type_ == "subscribe" and (answered(before) or item.approved):
            # Granted already, or before it was asked (3.4.2): the server answers for the user.
            if not answered(before):
                state = State("both" if seen_by_us(before.subscription) else "from", before.pending_out)
                await self._write(account, item, replace(_changed(item, state), approved=False))
            self._route(account, str(contact), "subscribed")
            if not answered(before):
                self._tell_presence(account, contact)
            return True
        step = INBOUND[type_, before]
        changed = _changed(item, step.state)
        if type_ == "subscribe" and step.passed:
            changed = replace(changed, pending_in=stanza.raw)
        if type_ == "subscribe" and str(contact) not in roster.items:
            most = self._module.options.for_host(account.domain, "max-roster-items")
            if most and len(roster.items) >= most:
                return True  # strangers can't fill a roster; they hear nothing, as from nobody
        await self._write(account, item, changed)
        if step.passed:
            self._to_available(account, stanza.envelope)
            self._module.tell(str(account), b"deliver " + stanza.envelope.SerializeToString())
        if type_ == "unsubscribe" and sees_us(before.subscription):
            self._tell_unavailable(account, contact)
        return True

    async def _probe(self, stanza: Stanza) -> bool:
        """4.3.2: the presence of each session to those who may see it; a refusal to others."""
        account, asker = stanza.to.bare, stanza.from_
        if asker.bare != account:
            if not await self._router.account_exists(account):
                self._route(account, str(asker), "unsubscribed")
                return True
            roster = await self._rosters.of(account, self._router)
            item = roster.items.get(str(asker.bare))
            if item is None or not sees_us(item.subscription):
                self._route(account, str(asker.bare), "unsubscribed")
                return True
        await self._answer(account, asker)
        return True

    async def _answer(self, account: Jid, asker: Jid) -> None:
        """With the presence of each session. While some may be at a router that has died, the answer waits until they
        are taken over or ended; nothing else does."""
        if not self._router.is_settled(str(account)) and self._waiting < MAX_WAITING:
            self._waiting += 1
            self._router.in_background(self._answer_later(account, asker), "answer to a probe")
            return
        shown = self._show(account, str(asker))
        elsewhere = await self._module.ask(str(account), b"show " + str(asker).encode())
        if not shown and not elsewhere:
            if self._router.is_settled(str(account)):
                self._route(account, str(asker), "unavailable")
            else:
                # A router that was asked has died meanwhile.
                await self._answer(account, asker)

    async def _answer_later(self, account: Jid, asker: Jid) -> None:
        try:
            await self._router.settled(str(account))
        finally:
            self._waiting -= 1
        await self._answer(account, asker)

    # --- what the same module in other routers says ---

    def noted(self, account: Jid, note: bytes) -> bytes | None:
        """For the sessions of an account that are here."""
        verb, _, rest = note.partition(b" ")
        if verb == b"show":
            return b"" if self._show(account, rest.decode()) else None
        if verb in (b"tell", b"hide"):
            contact = Jid.parse(rest.decode())
            (self._sessions_show if verb == b"tell" else self._sessions_hide)(account, contact)
        elif verb == b"deliver":
            self._to_available(account, Envelope.FromString(rest))
        elif verb == b"own":
            own = Envelope.FromString(rest)
            for session in list(self._router.sessions(str(account)).values()):
                if session.presence is not None:
                    self._to_session(session, Jid.parse(own.from_jid), own.stanza, own.type)
        return b""

    def _show(self, account: Jid, asker: str) -> bool:
        """Sends the presence of the sessions here to somebody; whether there were any."""
        available = [s for s in self._router.sessions(str(account)).values() if s.presence is not None]
        for session in available:
            assert session.presence is not None
            if str(session.jid) != asker:
                self._route(session.jid, asker, "", session.presence)
        return bool(available)

    def _to_available(self, account: Jid, envelope: Envelope) -> None:
        for session in list(self._router.sessions(str(account)).values()):
            if session.presence is not None:
                self._router.deliver(session, envelope)

    # --- helping each other ---

    async def _write(self, account: Jid, before: RosterItem, after: RosterItem) -> None:
        """Writes an item that changed; one with nothing left in it goes, unless the user had named it."""
        if after == before:
            return
        empty = RosterItem(after.contact)
        known = before != empty
        if after == empty and known and not before.listed:
            await self._rosters.remove(account, after.contact, self._router, push=False)
        else:
            visible = replace(before, pending_in=b"") != replace(after, pending_in=b"")
            await self._rosters.put(account, after, self._router, push=visible)

    def _tell_presence(self, account: Jid, contact: Jid) -> None:
        """3.1.5: who may see us now gets our presence."""
        self._sessions_show(account, contact)
        self._module.tell(str(account), b"tell " + str(contact).encode())

    def _sessions_show(self, account: Jid, contact: Jid) -> None:
        for session in list(self._router.sessions(str(account)).values()):
            if session.presence is not None:
                self._route(session.jid, str(contact), "", session.presence)

    def _tell_unavailable(self, account: Jid, contact: Jid) -> None:
        """3.2.2, 3.3.3: who may see us no longer is told that we are gone."""
        self._sessions_hide(account, contact)
        self._module.tell(str(account), b"hide " + str(contact).encode())

    def _sessions_hide(self, account: Jid, contact: Jid) -> None:
        for session in list(self._router.sessions(str(account)).values()):
            if session.presence is not None:
                self._route(session.jid, str(contact), "unavailable")

    def _route(
        self, from_: Jid, to: str, type_: str, raw: bytes = b"", stamped: bool = False, origin: str = ""
    ) -> None:
        if not raw:
            attributes = f" type='{type_}'" if type_ else ""
            raw = f"<presence from={quoteattr(str(from_))} to={quoteattr(to)}{attributes}/>".encode()
        elif not stamped:
            raw = _addressed(raw, to)
        self._router.route(
            Envelope(kind=PRESENCE, type=type_, from_jid=str(from_), to_jid=to, stanza=raw, origin=origin)
        )

    def _to_session(self, session: Session, from_: Jid, raw: bytes, type_: str) -> None:
        envelope = Envelope(
            kind=PRESENCE, type=type_, from_jid=str(from_), to_jid=str(session.jid),
            stanza=_addressed(raw, str(session.jid)),
        )  # fmt: skip
        self._router.deliver(session, envelope)


def _addressed(raw: bytes, to: str) -> bytes:
    """A broadcast presence with its receiver put in (4.2.2)."""
    end = len(b"<presence")
    return b"%b to=%b%b" % (raw[:end], quoteattr(to).encode(), raw[end:])


def _priority(stanza: Stanza) -> int:
    """4.7.2.3: an integer from -128 to 127; none is 0."""
    if "priority" not in stanza.children:
        return 0
    texts = [child.text or "" for child in stanza.tree if child.tag == f"{{{ns.CLIENT}}}priority"]
    try:
        priority = int(texts[0])
    except ValueError:
        raise StanzaError("bad-request", "a priority is a number") from None
    if len(texts) != 1 or not -128 <= priority <= 127:
        raise StanzaError("bad-request", "a priority is one number from -128 to 127")
    return priority


def _state(item: RosterItem) -> State:
    return State(item.subscription, item.ask, bool(item.pending_in))


def _changed(item: RosterItem, state: State) -> RosterItem:
    return replace(
        item,
        subscription=state.subscription,
        ask=state.pending_out,
        pending_in=item.pending_in if state.pending_in else b"",
    )
