"""The router's stores in memory: for tests, and to show what the ports mean."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.router.store import AccountExists, AccountRow, DirectedChange, Roster, RosterItem, SessionRow
from tidings.xmpp.jid import Jid
from tidings.xmpp.sasl import ScramKeys


class MemoryAccountStore:
    """Satisfies `services.router.store.AccountStore`."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], tuple[int, dict[str, ScramKeys]]] = {}
        self._shared: dict[str, bytes] = {}

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

    async def shared_key(self, name: str) -> bytes:
        return self._shared.setdefault(name, secrets.token_bytes(32))


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


class MemorySessionTable:
    """Satisfies `services.router.store.SessionTable`."""

    def __init__(self) -> None:
        self._rows: dict[Jid, SessionRow] = {}
        # By session: whom it sent presence directly.
        self._directed: dict[str, set[str]] = {}

    async def bind(self, jid: Jid, session: str, router: str) -> SessionRow | None:
        present = self._rows.setdefault(jid, SessionRow(jid, session, 1, router, True))
        return None if present.session == session else self._whole(present)

    def _whole(self, row: SessionRow) -> SessionRow:
        return replace(row, directed=tuple(sorted(self._directed.get(row.session, ()))))

    async def replace(self, row: SessionRow, session: str, router: str) -> bool:
        replaced = self._change(row, SessionRow(row.jid, session, row.epoch + 1, router, True))
        if replaced:
            self._directed.pop(row.session, None)
        return replaced

    async def move(self, row: SessionRow, router: str) -> bool:
        present = self._rows.get(row.jid)
        available = present is not None and present.available
        return self._change(row, SessionRow(row.jid, row.session, row.epoch + 1, router, available))

    def _change(self, row: SessionRow, changed: SessionRow) -> bool:
        present = self._rows.get(row.jid)
        if present is None:
            return False
        if replace(present, available=row.available, directed=row.directed) == row:
            self._rows[row.jid] = changed
            return True
        return replace(present, available=changed.available) == changed

    async def end(self, jid: Jid, session: str, epoch: int) -> SessionRow | None:
        present = self._rows.get(jid)
        if present is None or (present.session, present.epoch) != (session, epoch):
            return None
        removed = self._whole(self._rows.pop(jid))
        self._directed.pop(session, None)
        return removed

    async def set_directed(self, changes: Sequence[DirectedChange]) -> None:
        for jid, session, epoch, added, removed in changes:
            present = self._rows.get(jid)
            if present is not None and (present.session, present.epoch) == (session, epoch):
                before = self._directed.get(session, set())
                self._directed[session] = (set() if removed is None else before - set(removed)) | set(added)

    async def set_available(self, changes: Sequence[tuple[Jid, str, int, bool]]) -> None:
        for jid, session, epoch, available in changes:
            present = self._rows.get(jid)
            if present is not None and (present.session, present.epoch) == (session, epoch):
                self._rows[jid] = replace(present, available=available)

    async def of_account(self, account: Jid) -> list[SessionRow]:
        return [row for row in self._rows.values() if row.jid.bare == account]

    async def of_router(self, router: str) -> list[SessionRow]:
        return [row for row in self._rows.values() if row.router == router]

    async def ids_of_router(self, router: str) -> set[str]:
        return {row.session for row in await self.of_router(router)}

    async def routers(self) -> dict[str, int]:
        return dict(Counter(row.router for row in self._rows.values()))
