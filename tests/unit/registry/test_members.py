"""The rules of joining (DESIGN 7)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from services.registry import members as members_module
from services.registry.members import Members
from services.registry.store import Change
from services.registry.store_memory import MemoryNodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.cluster.node import Node, NodeState
from tidings.kit.probe import Outcome
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks

N1 = Node("n1", "i1", "127.0.0.11", 5777, ("router",), virtual_hosts=("example.org",), strategy="home")
N2 = replace(N1, hostname="n2", incarnation="i2", address="127.0.0.12")


def members(refused: bool = False, store: MemoryNodeStore | None = None, lease: float = 0.2) -> Members:
    async def probe(_address: str, _port: int) -> Outcome:
        return Outcome.REFUSED if refused else Outcome.SILENT

    return Members(store or MemoryNodeStore(), "own", lease, probe=probe)


async def incarnations(store: MemoryNodeStore) -> list[str]:
    return [node.incarnation for node in (await store.nodes())[1]]


async def reason(joining: Members, node: Node) -> int:
    with pytest.raises(TidingsError) as error:
        await joining.join(node)
    return error.value.reason


async def test_alike_nodes_join() -> None:
    joining = members()
    assert await joining.join(N1) == 1
    assert await joining.join(N2) == 2
    assert [node.hostname for node in joining.view] == ["n1", "n2"]


async def test_joining_twice_is_joining_once() -> None:
    joining = members()
    assert await joining.join(N1) == await joining.join(N1)


async def test_other_virtual_hosts_strategies_and_protocols_are_refused() -> None:
    joining = members()
    await joining.join(N1)
    refused = ErrorReason.ERROR_REASON_VIRTUAL_HOSTS_DIFFER
    assert await reason(joining, replace(N2, virtual_hosts=("example.net",))) == refused
    assert await reason(joining, replace(N2, strategy="broadcast")) == ErrorReason.ERROR_REASON_STRATEGY_DIFFERS
    assert await reason(joining, replace(N2, protocol=3)) == ErrorReason.ERROR_REASON_PROTOCOL_DIFFERS
    await joining.join(replace(N2, services=("connector",), strategy=""))


async def test_releases_that_follow_each_other_run_side_by_side() -> None:
    joining = members()
    await joining.join(replace(N1, protocol=2))
    await joining.join(replace(N2, protocol=1))
    await joining.join(replace(N1, hostname="n3", incarnation="i3", protocol=2))
    assert len(joining.view) == 3


class Beating(MemoryNodeStore):
    """A store in which n1 beats whenever somebody looks."""

    async def nodes(self) -> tuple[int, list[Node]]:
        await self.beat("n1", "i1", NodeState.UP, 0, 0)
        return await super().nodes()


NEWCOMER = replace(N1, incarnation="i9", address="127.0.0.99")


async def test_a_name_whose_owner_beats_is_taken() -> None:
    store = Beating()
    joining = members(store=store, lease=1.0)
    await joining.join(N1)
    assert await reason(joining, NEWCOMER) == ErrorReason.ERROR_REASON_NAME_TAKEN
    assert await incarnations(store) == ["i1"]


async def test_a_name_whose_owner_stands_still_is_given_after_the_lease() -> None:
    joining = members()
    await joining.join(N1)
    started = time.monotonic()
    await joining.join(NEWCOMER)
    assert time.monotonic() - started >= 0.2
    assert [node.incarnation for node in joining.view] == ["i9"]


async def test_a_dead_owner_is_replaced_when_its_beat_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "LATE", 0.1)
    joining = members(refused=True, lease=1000.0)
    await joining.join(N1)
    await joining.join(NEWCOMER)
    assert [node.incarnation for node in joining.view] == ["i9"]


async def test_a_restart_at_the_same_address_joins_when_the_beat_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "LATE", 0.1)
    joining = members(lease=1000.0)
    await joining.join(N1)
    await joining.join(replace(N1, incarnation="i9"))
    assert [node.incarnation for node in joining.view] == ["i9"]


@pytest.mark.parametrize("refused", [True, False])
async def test_who_beats_is_not_replaced_by_another_at_its_address(refused: bool) -> None:
    """Two hosts may claim one address; and a firewall may refuse us, and nobody else."""
    store = Beating()
    joining = members(refused, store)
    await joining.join(N1)
    newcomer = NEWCOMER if refused else replace(N1, incarnation="i9")
    assert await reason(joining, newcomer) == ErrorReason.ERROR_REASON_NAME_TAKEN
    assert await incarnations(store) == ["i1"]


async def test_a_name_is_free_when_the_routers_have_cleaned_up_after_its_old_start() -> None:
    """They can't have, before they know that it is dead: a fast restart comes sooner."""
    store = MemoryNodeStore()
    joining = members(store=store)
    await joining.join(N1)
    await joining.join(N2)
    await joining.beat("n2", "i2", NodeState.UP, 0, 0, cleaned=joining.view.version)
    joining._lease = 1000.0
    seen: list[str] = []
    joining.watch(lambda change, node, view: seen.append(f"{change.kind.value} {change.incarnation}"), lambda: None)
    again = replace(N1, incarnation="i9")
    restarted = asyncio.create_task(joining.join(again))
    async with asyncio.timeout(5):
        while "failed i1" not in seen:
            await asyncio.sleep(0.01)
    for _ in range(5):
        await asyncio.sleep(0.09)
        assert not restarted.done()
    await joining.beat("n2", "i2", NodeState.UP, 0, 0, cleaned=joining.view.version)
    await asyncio.wait_for(restarted, 5)
    assert seen == ["failed i1", "left i1", "joined i9"]


class Slow(MemoryNodeStore):
    """A store in which others can be faster between two calls."""

    async def nodes(self) -> tuple[int, list[Node]]:
        read = await super().nodes()
        await asyncio.sleep(0)
        return read


async def test_two_that_do_not_go_together_and_join_at_once_do_not_both_get_in() -> None:
    joining = members(store=Slow())
    other = replace(N2, strategy="broadcast")
    joined = await asyncio.gather(joining.join(N1), joining.join(other), return_exceptions=True)
    assert [type(one) for one in joined] == [int, TidingsError]
    assert [node.hostname for node in joining.view] == ["n1"]


async def test_an_incarnation_is_one_node_s_alone() -> None:
    joining = members()
    await joining.join(N1)
    assert await reason(joining, replace(N2, incarnation="i1")) == ErrorReason.ERROR_REASON_EXISTS


# --- what others see of a node ---


class Looks:
    """What each node finds when it connects to the node in question; a node that is not in here can't be asked."""

    def __init__(self, **outcomes: Outcome) -> None:
        self.outcomes = outcomes
        self.asked: list[str] = []

    async def own(self, address: str, _port: int) -> Outcome:
        return self.outcomes.get("own", Outcome.ACCEPTED)

    async def ask(self, asked: Node, node: Node) -> Outcome:
        self.asked.append(asked.hostname)
        if asked.hostname not in self.outcomes:
            raise TimeoutError
        return self.outcomes[asked.hostname]


async def cluster(looks: Looks, host: str = "", own: str = "own") -> tuple[Members, MemoryNodeStore]:
    """n1 to n3 are up, on one host, and n4 is the one in question."""
    store = MemoryNodeStore()
    looking = Members(store, own, 5.0, probe=looks.own, ask=looks.ask)
    for number in range(1, 5):
        node = replace(N1, hostname=f"n{number}", incarnation=f"i{number}", address=f"127.0.0.{number}")
        await looking.join(replace(node, host=host if number == 4 else ""))
        if number < 4:
            await looking.beat(f"n{number}", f"i{number}", NodeState.UP, 0, 0)
    return looking, store


async def state(store: MemoryNodeStore, name: str) -> str:
    return next(node.state.value for node in (await store.nodes())[1] if node.hostname == name)


async def test_who_joins_is_told_which_peers_do_not_reach_it() -> None:
    looks = Looks(n1=Outcome.ACCEPTED, n2=Outcome.SILENT)
    looking, _ = await cluster(looks)
    newcomer = looking.view.node("n4")
    assert newcomer is not None
    assert await looking.not_reached_by(newcomer) == ["n2", "n3"]
    looks.outcomes.update(n2=Outcome.ACCEPTED, n3=Outcome.ACCEPTED)
    assert await looking.not_reached_by(newcomer) == []
    looks.outcomes["own"] = Outcome.REFUSED
    assert await looking.not_reached_by(newcomer) == ["the registry"]


async def test_connectors_need_not_reach_who_joins() -> None:
    looks = Looks()
    looking, store = await cluster(looks)
    for number in range(1, 4):
        await store.leave(f"n{number}", f"i{number}")
    await looking.join(replace(N1, hostname="c1", incarnation="c", services=("connector",), strategy=""))
    await looking.beat("c1", "c", NodeState.UP, 0, 0)
    newcomer = looking.view.node("n4")
    assert newcomer is not None
    assert await looking.not_reached_by(newcomer) == []


async def test_a_second_node_that_is_refused_too_proves_a_death() -> None:
    looking, store = await cluster(Looks(own=Outcome.REFUSED, n1=Outcome.REFUSED, n2=Outcome.SILENT))
    node = looking.view.node("n4")
    assert node is not None
    assert await looking.look_at(node)
    assert await state(store, "n4") == "failed"


async def test_a_refusal_that_no_other_node_sees_proves_nothing() -> None:
    looking, store = await cluster(Looks(own=Outcome.REFUSED, n1=Outcome.ACCEPTED, n2=Outcome.SILENT))
    node = looking.view.node("n4")
    assert node is not None
    assert not await looking.look_at(node)
    assert await state(store, "n4") == "joining"


async def test_silence_proves_nothing() -> None:
    looking, store = await cluster(Looks(own=Outcome.SILENT))
    node = looking.view.node("n4")
    assert node is not None
    assert not await looking.look_at(node, reporter="i1", reporter_was_refused=True)
    assert await state(store, "n4") == "joining"


async def looked(looking: Members, store: MemoryNodeStore, at: float, reporter: str = "") -> str:
    """What becomes of n4 when its beat is first read now, and a registry looks at it some seconds later."""
    now = 0.0
    looking._clock = lambda: now
    looking._observer.look((await store.nodes())[1], now)
    now = at
    node = looking.view.node("n4")
    assert node is not None
    await looking.look_at(node, reporter, bool(reporter))
    return await state(store, "n4")


async def test_one_that_gets_through_outweighs_one_that_is_refused() -> None:
    looking, store = await cluster(Looks(own=Outcome.REFUSED, n1=Outcome.REFUSED, n2=Outcome.ACCEPTED))
    assert await looked(looking, store, 2.0) == "joining"


async def test_a_registry_that_can_ask_nobody_believes_its_own_eyes_only_when_the_beat_is_late() -> None:
    """A firewall may refuse everything that it sends, while all the others beat."""
    looking, store = await cluster(Looks(own=Outcome.REFUSED))
    assert await looked(looking, store, 1.3) == "joining"
    assert await looked(looking, store, 1.5) == "failed"


async def test_so_does_a_registry_that_has_nobody_to_ask() -> None:
    looking, store = await cluster(Looks(own=Outcome.REFUSED))
    for number in range(1, 4):
        await store.leave(f"n{number}", f"i{number}")
    assert await looked(looking, store, 1.3) == "joining"
    assert await looked(looking, store, 1.5) == "failed"


async def test_what_refuses_us_on_the_way_to_another_host_proves_nothing_when_our_own_host_sees_it_too() -> None:
    looks = Looks(own=Outcome.REFUSED, n2=Outcome.REFUSED, n3=Outcome.REFUSED)
    looking, store = await cluster(looks, host="elsewhere", own="i1")
    assert await looked(looking, store, 1.3) == "joining"
    assert await looked(looking, store, 1.3, reporter="i2") == "joining"
    assert looks.asked == []
    assert await looked(looking, store, 1.5) == "failed"


async def test_somebody_who_was_refused_on_another_host_is_a_witness() -> None:
    looking, store = await cluster(Looks(own=Outcome.REFUSED))
    assert await looked(looking, store, 0.0, reporter="i2") == "failed"


# --- the view ---


class Away(MemoryNodeStore):
    """A store whose database can hang, or fail in a way that nobody thought of."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: Exception | None = None
        self.hangs = False

    async def nodes(self) -> tuple[int, list[Node]]:
        if self.hangs:
            await asyncio.Event().wait()
        if self.trouble is not None:
            raise self.trouble
        return await super().nodes()


async def test_while_the_database_hangs_the_last_view_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "READ_TIMEOUT", 0.05)
    store = Away()
    telling = members(store=store)
    await telling.join(N1)
    assert await telling.latest() == (telling.view, True)
    store.hangs = True
    view, read = await telling.latest()
    assert ([node.hostname for node in view], read) == (["n1"], False)


async def test_an_error_that_nobody_thought_of_ends_no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "LOOK", 0.01)
    store = Away()
    looking = members(store=store)
    await looking.join(N1)
    store.trouble = KeyError("unexpected")
    running = asyncio.create_task(looking.run())
    await asyncio.sleep(0.05)
    store.trouble = None
    await store.join(N2, None, lambda _others: None)
    async with asyncio.timeout(5):
        while len(looking.view) < 2:
            await asyncio.sleep(0.01)
    running.cancel()


class Locked(MemoryNodeStore):
    """A store in which the row of n1 is locked."""

    async def mark(self, hostname: str, incarnation: str, beat: int, state: NodeState) -> bool:
        if hostname == "n1":
            await asyncio.Event().wait()
        return await super().mark(hostname, incarnation, beat, state)


async def test_a_locked_row_holds_up_no_verdict_about_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "LOOK", 0.01)
    store = Locked()
    tasks = Tasks()
    looking = Members(store, "own", 0.2, probe=Looks(own=Outcome.SILENT).own, spawn=tasks.spawn)
    await looking.join(N1)
    await looking.join(N2)
    tasks.spawn(looking.run(), "run")
    async with asyncio.timeout(5):
        while await state(store, "n2") != "failed":
            await asyncio.sleep(0.01)
    await tasks.stop()


async def test_the_first_node_of_an_empty_table_is_told_to_who_watches_already() -> None:
    watched = members()
    await watched.refresh()
    seen: list[Change] = []
    watched.watch(lambda change, node, view: seen.append(change), lambda: None)
    await watched.join(N1)
    assert [(change.version, change.hostname) for change in seen] == [(1, "n1")]


async def test_a_table_that_was_set_back_ends_all_watches() -> None:
    store = MemoryNodeStore()
    watched = members(store=store)
    await watched.join(N1)
    await watched.join(N2)
    over: list[bool] = []
    watched.watch(lambda change, node, view: None, lambda: over.append(True))
    watched._store = earlier = MemoryNodeStore()
    await earlier.join(N1, None, lambda _others: None)
    await watched.refresh()
    assert over == [True]
    assert [node.hostname for node in watched.view] == ["n1"]


async def test_a_crashed_node_s_next_start_on_its_host_joins_at_once() -> None:
    joining = members(lease=1000.0)
    await joining.join(replace(N1, host="boot-1"))
    started = time.monotonic()
    await joining.join(replace(N1, incarnation="i9", host="boot-1"))
    assert [node.incarnation for node in joining.view] == ["i9"]
    assert time.monotonic() - started < 0.2


async def test_a_watcher_is_told_each_state_though_the_next_one_has_come_already() -> None:
    """Who drains fast may have left before anybody looks: that it drained is told nevertheless."""
    store = MemoryNodeStore()
    watching = members(store=store)
    await watching.join(N1)
    told: list[tuple[str, str]] = []
    watching.watch(lambda change, node, _view: told.append((change.kind.value, node.state.value)), lambda: None)
    await store.beat("n1", "i1", NodeState.UP, 0, 0)
    await store.beat("n1", "i1", NodeState.DRAINING, 0, 0)
    await store.leave("n1", "i1")
    await watching.refresh()
    assert told[:2] == [("back", "up"), ("draining", "draining")]
    assert told[2][0] == "left"
