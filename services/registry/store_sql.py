"""The nodes in the shared database."""

from __future__ import annotations

import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.schema import cluster_changes, cluster_nodes, cluster_version
from services.registry.store import Change, ChangeKind, Check
from tidings.cluster.node import Node, NodeState
from tidings.kit.db import Database
from tidings.kit.logging import get_logger
from tidings.kit.pki import fingerprint

log = get_logger("registry")

# Older changes are forgotten; who watched so long ago begins anew with a snapshot.
KEPT_CHANGES = 1000
# Of a node that reaches more others than these no longer, the rest does not matter.
MOST_UNREACHABLE = 100


class SqlNodeStore:
    """Satisfies `services.registry.store.NodeStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def join(self, node: Node, replaces: Node | None, check: Check) -> int | None:
        async def work(connection: AsyncConnection) -> int | None:
            if replaces is not None:
                failed = cluster_nodes.c.state == NodeState.FAILED.value
                removed = await connection.execute(
                    cluster_nodes.delete().where(*_is(replaces.hostname, replaces.incarnation), failed)
                )
                if not removed.rowcount:
                    return None
                await _changed(connection, ChangeKind.LEFT, replaces)
            version = await _changed(connection, ChangeKind.JOINED, node)
            # Others that join wait for the version's row: what is read now is what will stand beside the node.
            rows = await connection.execute(sa.select(cluster_nodes).where(cluster_nodes.c.hostname != node.hostname))
            check([_node(row._mapping) for row in rows])
            await connection.execute(cluster_nodes.insert().values({**_row(node), "joined": version}))
            return version

        try:
            return await self._database.transaction(work, causal=True)
        except IntegrityError:
            return None

    async def beat(
        self,
        hostname: str,
        incarnation: str,
        state: NodeState,
        cpu: float,
        memory: float,
        cleaned: int = 0,
        unreachable: tuple[str, ...] = (),
    ) -> bool:
        present = cluster_nodes.c.state
        update = cluster_nodes.update().values(
            beat=cluster_nodes.c.beat + 1, last_update=_now(), state=state.value, cpu_usage=cpu, mem_usage=memory,
            cleaned=cleaned, unreachable=",".join(unreachable[:MOST_UNREACHABLE]),
        )  # fmt: skip
        here = _is(hostname, incarnation)
        if not self._database.sqlite:
            # Committed by the server with the statement: a node that is cut off in the midst of a transaction would
            # leave its row locked, and nobody could declare it dead.
            async with self._database.at_once() as connection:
                if (await connection.execute(update.where(*here, present == state.value))).rowcount:
                    return True

        async def work(connection: AsyncConnection) -> bool:
            before = (await connection.execute(sa.select(present).where(*here).with_for_update())).scalar()
            if before in (None, NodeState.FAILED.value):
                return False
            await connection.execute(update.where(*here))
            if before != state.value:
                kind = ChangeKind.DRAINING if state is NodeState.DRAINING else ChangeKind.BACK
                await _changed_id(connection, kind, hostname, incarnation)
            return True

        return await self._database.transaction(work, causal=True)

    async def leave(self, hostname: str, incarnation: str) -> None:
        await self._remove(hostname, incarnation)

    async def remove_failed(self, hostname: str, incarnation: str) -> None:
        await self._remove(hostname, incarnation, cluster_nodes.c.state == NodeState.FAILED.value)

    async def _remove(self, hostname: str, incarnation: str, *where: sa.ColumnElement[bool]) -> None:
        async def work(connection: AsyncConnection) -> None:
            removed = await connection.execute(cluster_nodes.delete().where(*_is(hostname, incarnation), *where))
            if removed.rowcount:
                await _changed_id(connection, ChangeKind.LEFT, hostname, incarnation)

        await self._database.transaction(work, causal=True)

    async def mark(self, hostname: str, incarnation: str, beat: int, state: NodeState) -> bool:
        present = cluster_nodes.c.state
        may = present == NodeState.UP.value if state is NodeState.SUSPECT else present != NodeState.FAILED.value

        async def work(connection: AsyncConnection) -> bool:
            marked = await connection.execute(
                cluster_nodes.update()
                .where(*_is(hostname, incarnation), cluster_nodes.c.beat == beat, may)
                .values(state=state.value)
            )
            if not marked.rowcount:
                return False
            await _changed_id(connection, ChangeKind(state.value), hostname, incarnation)
            return True

        return await self._database.transaction(work, causal=True)

    async def nodes(self) -> tuple[int, list[Node]]:
        async with self._database.read(causal=True) as connection:
            version = (await connection.execute(sa.select(cluster_version.c.version))).scalar_one()
            while True:
                rows = await connection.execute(sa.select(cluster_nodes).order_by(cluster_nodes.c.hostname))
                now = (await connection.execute(sa.select(cluster_version.c.version))).scalar_one()
                if now == version:
                    return version, [_node(row._mapping) for row in rows]
                # Something changed between the reads: these rows are those of no version.
                version = now

    async def changes(self, since: int) -> list[Change] | None:
        async with self._database.read(causal=True) as connection:
            first, last = (
                await connection.execute(
                    sa.select(sa.func.min(cluster_changes.c.version), sa.func.max(cluster_changes.c.version))
                )
            ).one()
            if since > (last or 0) or (first is not None and since < first - 1):
                return None
            rows = await connection.execute(
                sa.select(cluster_changes)
                .where(cluster_changes.c.version > since)
                .order_by(cluster_changes.c.version)
            )
            return [
                Change(row.version, kind, row.hostname, row.incarnation)
                for row in rows
                if (kind := _kind(row.kind)) is not None
            ]


def _is(hostname: str, incarnation: str) -> tuple[sa.ColumnElement[bool], ...]:
    return cluster_nodes.c.hostname == hostname, cluster_nodes.c.incarnation == incarnation


async def _changed(connection: AsyncConnection, kind: ChangeKind, node: Node) -> int:
    return await _changed_id(connection, kind, node.hostname, node.incarnation)


async def _changed_id(connection: AsyncConnection, kind: ChangeKind, hostname: str, incarnation: str) -> int:
    await connection.execute(cluster_version.update().values(version=cluster_version.c.version + 1))
    version = int((await connection.execute(sa.select(cluster_version.c.version))).scalar_one())
    await connection.execute(
        cluster_changes.insert().values(
            version=version, kind=kind.value, hostname=hostname, incarnation=incarnation, happened=_now()
        )
    )
    if version % 100 == 0:
        await connection.execute(cluster_changes.delete().where(cluster_changes.c.version < version - KEPT_CHANGES))
    return version


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def _row(node: Node) -> dict[str, Any]:
    started = datetime.datetime.fromtimestamp(node.started_unix_ms / 1000, datetime.UTC).replace(tzinfo=None)
    return {
        "hostname": node.hostname, "secondary": node.secondary, "address": node.address, "port": node.port,
        "password": fingerprint(node.certificate.encode()) if node.certificate else "",
        "last_update": _now(), "started": started, "host": node.host, "incarnation": node.incarnation,
        "beat": 0, "cpu_usage": node.cpu_usage, "mem_usage": node.mem_usage,
        "services": ",".join(node.services), "state": node.state.value, "version": node.version,
        "protocol": node.protocol, "virt_hosts": ",".join(node.virtual_hosts), "strategy": node.strategy,
        "certificate": node.certificate, "cleaned": 0, "unreachable": "",
    }  # fmt: skip


def _unix_ms(time: datetime.datetime) -> int:
    return int(time.replace(tzinfo=datetime.UTC).timestamp() * 1000)


@cache
def _kind(text: str) -> ChangeKind | None:
    """None for what a newer release tells, of which this one knows nothing."""
    try:
        return ChangeKind(text)
    except ValueError:
        log.warning("unknown_change", kind=text)
        return None


@cache
def _state(text: str) -> NodeState:
    """SUSPECT for what a newer release says: it is there, and nobody should count on it."""
    try:
        return NodeState(text)
    except ValueError:
        log.warning("unknown_state", state=text)
        return NodeState.SUSPECT


def _node(row: Any) -> Node:
    return Node(
        hostname=row["hostname"], secondary=row["secondary"], address=row["address"], port=row["port"],
        host=row["host"], incarnation=row["incarnation"], beat=row["beat"],
        services=tuple(row["services"].split(",")), state=_state(row["state"]), version=row["version"],
        protocol=row["protocol"], virtual_hosts=tuple(row["virt_hosts"].split(",")), strategy=row["strategy"],
        started_unix_ms=_unix_ms(row["started"]), last_update_unix_ms=_unix_ms(row["last_update"]),
        cpu_usage=row["cpu_usage"], mem_usage=row["mem_usage"], certificate=row["certificate"],
        cleaned=row["cleaned"], unreachable=tuple(filter(None, row["unreachable"].split(","))), joined=row["joined"],
    )  # fmt: skip
