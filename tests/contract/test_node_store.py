"""What the registry's store must do: one suite over memory, SQLite, MariaDB, and registries that use different servers
of Galera at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from services.registry.store import ChangeKind, NodeStore
from services.registry.store_memory import MemoryNodeStore
from services.registry.store_sql import SqlNodeStore
from tests.contract.spread import Spread, databases
from tidings.cluster.node import Node, NodeState
from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import Database
from tidings.kit.migrations import migrate

N1 = Node(
    "n1.example.org",
    "i1",
    "127.0.0.11",
    5777,
    ("connector", "router"),
    virtual_hosts=("example.org",),
    started_unix_ms=1_700_000_000_000,
)
N2 = replace(N1, hostname="n2.example.org", incarnation="i2", address="127.0.0.12")


@pytest.fixture(params=["memory", "sqlite", "mysql", "galera"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NodeStore]:
    if request.param == "memory":
        yield MemoryNodeStore()
        return
    if request.param == "galera":
        async with databases(request.getfixturevalue("galera")) as opened:
            await asyncio.gather(*(migrate(one, "registry", "services.registry:migrations") for one in opened))
            yield cast(NodeStore, Spread([SqlNodeStore(one) for one in opened]))
        return
    url = (
        DatabaseUrl("sqlite", path=tmp_path / "t.sqlite")
        if request.param == "sqlite"
        else parse(request.getfixturevalue("mariadb").create_database())
    )
    database = Database(url)
    await database.start()
    await migrate(database, "registry", "services.registry:migrations")
    yield SqlNodeStore(database)
    await database.stop()


def anybody(others: Sequence[Node]) -> None:
    """A check that lets everybody in."""


class Refused(Exception):
    """What a check raises."""


def alone(others: Sequence[Node]) -> None:
    """A check that lets a node in only when there is no other one."""
    if others:
        raise Refused


async def names(store: NodeStore) -> list[tuple[str, str]]:
    return [(node.hostname, node.state.value) for node in (await store.nodes())[1]]


async def kinds(store: NodeStore) -> list[str]:
    changes = await store.changes(0)
    assert changes is not None
    return [change.kind.value for change in changes]


async def test_a_node_that_joined_is_listed_as_it_said(store: NodeStore) -> None:
    assert await store.join(N1, None, anybody) == 1
    version, (listed,) = await store.nodes()
    assert version == 1
    assert replace(listed, last_update_unix_ms=0) == replace(N1, joined=1)


async def test_of_ten_starts_under_one_name_exactly_one_joins(store: NodeStore) -> None:
    joined = await asyncio.gather(*(store.join(replace(N1, incarnation=f"i{n}"), None, anybody) for n in range(10)))
    assert sum(version is not None for version in joined) == 1


async def test_a_newcomer_replaces_only_the_failed_row_that_it_saw(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    newer = replace(N1, incarnation="i9")
    assert await store.join(newer, N1, anybody) is None, "it has not failed"
    await store.mark(N1.hostname, "i1", 0, NodeState.FAILED)
    assert await store.join(newer, replace(N1, incarnation="other"), anybody) is None
    assert await store.join(newer, None, anybody) is None
    assert await store.join(newer, N1, anybody) is not None
    assert [node.incarnation for node in (await store.nodes())[1]] == ["i9"]
    assert await kinds(store) == ["joined", "failed", "left", "joined"]


async def test_what_a_check_raises_ends_the_join_and_leaves_nothing(store: NodeStore) -> None:
    await store.join(N1, None, alone)
    with pytest.raises(Refused):
        await store.join(N2, None, alone)
    assert await names(store) == [("n1.example.org", "joining")]
    assert await kinds(store) == ["joined"]


async def test_a_check_does_not_see_the_row_that_is_replaced(store: NodeStore) -> None:
    await store.join(N1, None, alone)
    await store.mark(N1.hostname, "i1", 0, NodeState.FAILED)
    assert await store.join(replace(N1, incarnation="i9"), N1, alone) is not None


async def test_of_many_that_bear_no_other_node_and_join_at_once_one_gets_in(store: NodeStore) -> None:
    nodes = [replace(N1, hostname=f"m{n}.example.org", incarnation=f"i{n}") for n in range(6)]
    joined = await asyncio.gather(*(store.join(node, None, alone) for node in nodes), return_exceptions=True)
    assert sum(isinstance(version, int) for version in joined) == 1
    assert sum(isinstance(error, Refused) for error in joined) == 5
    assert len(await names(store)) == 1


async def test_an_incarnation_is_one_node_s_alone(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    assert await store.join(replace(N2, incarnation="i1"), None, anybody) is None
    assert await names(store) == [("n1.example.org", "joining")]
    assert await kinds(store) == ["joined"]


async def test_a_beat_raises_the_number_and_tells_of_a_new_state_once(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    assert await store.beat(N1.hostname, "i1", NodeState.UP, 10.0, 20.0)
    assert await store.beat(N1.hostname, "i1", NodeState.UP, 11.0, 21.0)
    (node,) = (await store.nodes())[1]
    assert (node.beat, node.state, node.cpu_usage, node.mem_usage) == (2, NodeState.UP, 11.0, 21.0)
    assert await store.beat(N1.hostname, "i1", NodeState.DRAINING, 0.0, 0.0)
    assert await kinds(store) == ["joined", "back", "draining"]


async def test_a_beat_says_who_is_not_reached_until_the_next_one_does_not(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0, unreachable=("i2", "i3"))
    assert (await store.nodes())[1][0].unreachable == ("i2", "i3")
    await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)
    assert (await store.nodes())[1][0].unreachable == ()


async def test_who_is_gone_failed_or_somebody_else_beats_in_vain(store: NodeStore) -> None:
    assert not await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)
    await store.join(N1, None, anybody)
    assert not await store.beat(N1.hostname, "other", NodeState.UP, 0, 0)
    assert await store.mark(N1.hostname, "i1", 0, NodeState.FAILED)
    assert not await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)


async def test_marking_is_a_compare_and_set_on_incarnation_and_beat(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0)
    assert not await store.mark(N1.hostname, "i1", 0, NodeState.FAILED), "it has beaten meanwhile"
    assert not await store.mark(N1.hostname, "other", 1, NodeState.FAILED)
    assert await store.mark(N1.hostname, "i1", 1, NodeState.SUSPECT)
    assert not await store.mark(N1.hostname, "i1", 1, NodeState.SUSPECT), "told once"
    assert await store.beat(N1.hostname, "i1", NodeState.UP, 0, 0), "a suspect that beats is back"
    assert await kinds(store) == ["joined", "back", "suspect", "back"]


async def test_only_a_node_that_is_up_becomes_suspect(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    assert not await store.mark(N1.hostname, "i1", 0, NodeState.SUSPECT), "it is joining"
    await store.beat(N1.hostname, "i1", NodeState.DRAINING, 0, 0)
    assert not await store.mark(N1.hostname, "i1", 1, NodeState.SUSPECT), "it is draining"
    assert await names(store) == [("n1.example.org", "draining")]
    assert await store.mark(N1.hostname, "i1", 1, NodeState.FAILED)


async def test_of_many_who_mark_at_once_one_does(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    marked = await asyncio.gather(*(store.mark(N1.hostname, "i1", 0, NodeState.FAILED) for _ in range(6)))
    assert sum(marked) == 1


async def test_a_node_leaves_by_itself_and_by_its_incarnation_alone(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    await store.join(N2, None, anybody)
    await store.leave(N1.hostname, "other")
    assert len(await names(store)) == 2
    await store.leave(N1.hostname, "i1")
    await store.leave(N1.hostname, "i1")
    assert await names(store) == [("n2.example.org", "joining")]
    assert (await kinds(store)).count("left") == 1


async def test_only_failed_rows_are_removed_for_others(store: NodeStore) -> None:
    await store.join(N1, None, anybody)
    await store.remove_failed(N1.hostname, "i1")
    assert await names(store) == [("n1.example.org", "joining")]
    await store.mark(N1.hostname, "i1", 0, NodeState.FAILED)
    await store.remove_failed(N1.hostname, "i1")
    assert await names(store) == []


async def test_changes_since_a_version_are_those_after_it(store: NodeStore) -> None:
    first = await store.join(N1, None, anybody)
    assert first is not None
    await store.join(N2, None, anybody)
    changes = await store.changes(first)
    assert changes is not None
    assert [(change.kind, change.hostname) for change in changes] == [(ChangeKind.JOINED, "n2.example.org")]
    assert await store.changes(first + 1) == []
    assert await store.changes(first + 2) is None, "a version that has never been"
