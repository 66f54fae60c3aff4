"""XEP-0441: Message Archive Management Preferences: which of an account's messages go into its archive."""

from __future__ import annotations

import asyncio

from lxml import etree

from services.router.archive_rules import ArchiveRules
from services.router.messages import MessageStore, Preferences
from services.router.modules.xep_0313_mam import owner
from tidings.kit.db import DatabaseAway
from tidings.kit.module import Module, ModuleSpec, Session, Stanza, Where
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import escape_text

PREFS = f"{{{ns.MAM}}}prefs"
ALWAYS = f"{{{ns.MAM}}}always"
NEVER = f"{{{ns.MAM}}}never"
JID = f"{{{ns.MAM}}}jid"

# 2.1.1
DEFAULTS = ("always", "never", "roster")

# Seconds between two tries while the database is away.
RETRY = 1.0
# JIDs in one list: stops lists that every message of the account would be held against for long.
MAX_LISTED = 500


def load(module: Module) -> None:
    preferences = _ArchivePreferences(module)
    module.on_iq(PREFS, preferences.get, types=("get",), where=(Where.ACCOUNT,))
    module.on_iq(PREFS, preferences.set, types=("set",), where=(Where.ACCOUNT,))
    module.on_session_started(preferences.started)
    module.on_session_attached(preferences.attached)
    module.on_session_ended(preferences.ended)
    module.on_session_left(preferences.left)
    module.on_note(preferences.noted)


MODULE = ModuleSpec("mam-prefs", load, xep="XEP-0441", version="0.2.0", needs=("mam",))


class _ArchivePreferences:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._options = module.options
        self._router = module.router
        self._messages = module.router.store(MessageStore)
        self._rules = module.router.store(ArchiveRules)

    # --- what is known of those who are here ---

    async def started(self, session: Session) -> None:
        """What the session sends waits for this, so it is tried once."""
        try:
            await self._rules.load(session.jid.bare, self._router)
        except DatabaseAway:
            self.attached(session)

    def attached(self, session: Session) -> None:
        self._router.in_background(self._load(session.jid.bare), "archive preferences")

    async def _load(self, account: Jid) -> None:
        """Without the database the host's default counts, until it is back."""
        while self._router.sessions(str(account)):
            try:
                await self._rules.load(account, self._router)
                return
            except DatabaseAway:
                await asyncio.sleep(RETRY)

    def ended(self, session: Session, _was_available: bool) -> None:
        self.left(session)

    def left(self, session: Session) -> None:
        if not self._router.sessions(session.account):
            self._rules.forget(session.account)

    def noted(self, account: Jid, _note: bytes) -> bytes:
        """Another router has changed them."""
        self._router.in_background(self._load(account), "archive preferences")
        return b""

    # --- requests ---

    async def get(self, iq: Stanza) -> bytes:
        account = owner(iq).jid.bare
        found = await self._messages.preferences(account)
        if found is None:
            archived = self._options.for_host(account.domain, "archive")
            found = Preferences("always" if archived else "never", (), ())
        return _written(found)

    async def set(self, iq: Stanza) -> bytes:
        """2.1: what is not written is not kept from before; the answer says what applies now."""
        account = owner(iq).jid.bare
        default = iq.payload.get("default", "")
        if default not in DEFAULTS:
            raise StanzaError("bad-request", f"the default is one of {', '.join(DEFAULTS)}")
        wanted = Preferences(default, _listed(iq.payload, ALWAYS), _listed(iq.payload, NEVER))
        if not set(wanted.always).isdisjoint(wanted.never):
            raise StanzaError("bad-request", "a JID is in both lists")
        await self._messages.set_preferences(account, wanted)
        await self._rules.load(account, self._router)
        self._module.tell(str(account), b"")
        return _written(wanted)


def _listed(prefs: etree._Element, name: str) -> tuple[str, ...]:
    """The JIDs of a list, prepared; each once. Raises StanzaError, JidError."""
    texts = [child.text or "" for listed in prefs.iterfind(name) for child in listed.iterfind(JID)]
    if len(texts) > MAX_LISTED:
        raise StanzaError("not-acceptable", f"a list has at most {MAX_LISTED} JIDs")
    return tuple(dict.fromkeys(str(Jid.parse(text.strip())) for text in texts))


def _written(preferences: Preferences) -> bytes:
    """2.1: both lists are always there."""
    always, never = (
        "".join(f"<jid>{escape_text(jid)}</jid>" for jid in listed)
        for listed in (preferences.always, preferences.never)
    )
    return (
        f"<prefs xmlns='{ns.MAM}' default='{preferences.default}'>"
        f"<always>{always}</always><never>{never}</never></prefs>"
    ).encode()
