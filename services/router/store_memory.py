"""The router's stores in memory: for tests, and to show what the ports mean."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence

from services.router.store import AccountExists, AccountRow, KeptMessage, Roster, RosterItem
from tidings.xmpp.jid import Jid
from tidings.xmpp.sasl import ScramKeys


class MemoryAccountStore:
    """Satisfies `services.router.store.AccountStore`."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], tuple[int, dict[str, ScramKeys]]] = {}
        self._fake = secrets.token_bytes(32)

    async def create(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        if (host, local) in self._accounts:
            raise AccountExists(f"{local}@{host}")
        self._accounts[host, local] = (int(time.time() * 1000), dict(keys))

    async def keys(self, host: str, local: str, hash_name: str) -> ScramKeys | None:
        account = self._accounts.get((host, local))
        return account[1].get(hash_name) if account else None

    async def set_keys(self, host: str, local: str, keys: Mapping[str, ScramKeys]) -> None:
        account = self._accounts.get((host, local))
        if account:
            self._accounts[host, local] = (account[0], dict(keys))

    async def delete(self, host: str, local: str) -> None:
        self._accounts.pop((host, local), None)

    async def exists(self, host: str, local: str) -> bool:
        return (host, local) in self._accounts

    async def page(self, host: str | None, after: str, limit: int) -> list[AccountRow]:
        rows = [
            AccountRow(f"{local}@{at}", created)
            for (at, local), (created, _) in self._accounts.items()
            if host is None or at == host
        ]
        return sorted(row for row in rows if row.jid > after)[:limit]

    async def fake_salt_key(self) -> bytes:
        return self._fake


class MemoryRosterStore:
    """Satisfies `services.router.store.RosterStore`."""

    def __init__(self) -> None:
        self._rosters: dict[Jid, Roster] = {}
        self._changed: dict[Jid, dict[str, int]] = {}

    async def load(self, account: Jid) -> Roster:
        roster = self._rosters.get(account, Roster())
        return Roster(roster.version, dict(roster.items))

    def _change(self, account: Jid, contact: str) -> Roster:
        roster = self._rosters.setdefault(account, Roster())
        roster.version += 1
        self._changed.setdefault(account, {})[contact] = roster.version
        return roster

    async def put(self, account: Jid, item: RosterItem) -> int:
        roster = self._change(account, item.contact)
        roster.items[item.contact] = item
        return roster.version

    async def remove(self, account: Jid, contact: str) -> int:
        roster = self._change(account, contact)
        roster.items.pop(contact, None)
        return roster.version

    async def changes(self, account: Jid, since: int) -> list[tuple[int, str]] | None:
        if since > self._rosters.get(account, Roster()).version:
            return None
        changed = self._changed.get(account, {})
        return sorted((version, contact) for contact, version in changed.items() if version > since)

    async def delete_all(self, account: Jid) -> None:
        self._rosters.pop(account, None)
        self._changed.pop(account, None)


class MemoryMessageStore:
    """Satisfies `services.router.store.MessageStore`."""

    def __init__(self) -> None:
        self._messages: dict[Jid, list[KeptMessage]] = {}
        self._known: set[tuple[Jid, str, int]] = set()
        self._last = 0

    async def keep(
        self,
        account: Jid,
        *,
        id_: str,
        from_jid: str,
        received_unix_ms: int,
        stanza: bytes,
        origin: str,
        number: int,
    ) -> None:
        if origin:
            if (account, origin, number) in self._known:
                return
            self._known.add((account, origin, number))
        self._last += 1
        kept = KeptMessage(self._last, id_, from_jid, received_unix_ms, stanza)
        self._messages.setdefault(account, []).append(kept)

    async def pending(self, account: Jid, after: int, limit: int) -> list[KeptMessage]:
        return [kept for kept in self._messages.get(account, ()) if kept.position > after][:limit]

    async def pending_count(self, account: Jid) -> int:
        return len(self._messages.get(account, ()))

    async def delivered(self, account: Jid, positions: Sequence[int]) -> None:
        gone = set(positions)
        left = [kept for kept in self._messages.get(account, ()) if kept.position not in gone]
        self._messages[account] = left

    async def delete_all(self, account: Jid) -> None:
        self._messages.pop(account, None)
