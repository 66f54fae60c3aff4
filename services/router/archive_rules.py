"""Which messages go into the archives of the accounts that have sessions here: what XEP-0441 lets them say."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from services.router.messages import MessageStore, Preferences
from services.router.rosters import Rosters
from tidings.kit.module import RouterPort
from tidings.xmpp.jid import Jid


class ArchiveRules:
    """Asked for every message, so that it must not wait: preferences are read when a session starts."""

    def __init__(
        self, messages: MessageStore, rosters: Rosters, host_default: Callable[[str], bool], hosts: Iterable[str]
    ) -> None:
        """`host_default`: whether accounts of a host have an archive that have not said."""
        self._messages = messages
        self._rosters = rosters
        self._host_default = host_default
        self._idle_by_default = not any(host_default(host) for host in hosts)
        self._defaults: dict[str, bool] = {}
        # Of accounts that have set some.
        self._preferences: dict[str, Preferences] = {}

    @property
    def idle(self) -> bool:
        """Nobody archives anything: then nobody needs to be asked."""
        return self._idle_by_default and not self._preferences

    def archives(self, account: Jid, peer: str) -> bool:
        """Whether a message from or to `peer` goes into an account's archive."""
        preferences = self._preferences.get(account.bare_text) if self._preferences else None
        if preferences is None:
            default = self._defaults.get(account.domain)
            if default is None:
                default = self._defaults[account.domain] = self._host_default(account.domain)
            return default
        # 2.3.1: a full JID in a list counts before the bare one.
        bare = peer.partition("/")[0]
        for listed in (peer, bare):
            if listed in preferences.never:
                return False
            if listed in preferences.always:
                return True
        if preferences.default == "roster":
            # While the roster is being read again, what may belong there is kept.
            return self._rosters.has(account.bare_text, bare) is not False
        return preferences.default == "always"

    async def load(self, account: Jid, router: RouterPort) -> None:
        """Reads the preferences of an account, and what else they need. Raises DatabaseAway."""
        self.put(account, await self._messages.preferences(account))
        found = self._preferences.get(account.bare_text)
        if found is not None and found.default == "roster":
            await self._rosters.of(account, router)

    def put(self, account: Jid, preferences: Preferences | None) -> None:
        if preferences is None:
            self.forget(account.bare_text)
        else:
            self._preferences[account.bare_text] = preferences

    def forget(self, account: str) -> None:
        """The account has no session here any more."""
        self._preferences.pop(account, None)
