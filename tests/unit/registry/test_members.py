"""The rules of joining (DESIGN 7)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.cluster.node import Node, NodeState
from tidings.kit.rpc_errors import TidingsError

N1 = Node("n1", "i1", "127.0.0.11", 5777, ("router",), virtual_hosts=("example.org",), strategy="home")
N2 = replace(N1, hostname="n2", incarnation="i2", address="127.0.0.12")


def members(refused: bool = False, store: MemoryNodeStore | None = None, lease: float = 0.2) -> Members:
    async def probe(_address: str, _port: int) -> bool:
        return refused

    return Members(store or MemoryNodeStore(), "own", lease, probe=probe)


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
    assert await reason(joining, replace(N2, protocol=2)) == ErrorReason.ERROR_REASON_PROTOCOL_DIFFERS
    await joining.join(replace(N2, services=("connector",), strategy=""))


async def test_a_name_whose_owner_beats_is_taken() -> None:
    store = MemoryNodeStore()
    joining = members(store=store)
    await joining.join(N1)

    async def alive(_address: str, _port: int) -> bool:
        await store.beat("n1", "i1", NodeState.UP, 0, 0)
        return False

    joining._probe = alive
    newcomer = replace(N1, incarnation="i9", address="127.0.0.99")
    joining._lease = 1.0
    before = await store.nodes()

    async def nodes_with_beat():  # type: ignore[no-untyped-def]
        await store.beat("n1", "i1", NodeState.UP, 0, 0)
        return await MemoryNodeStore.nodes(store)

    store.nodes = nodes_with_beat  # type: ignore[method-assign]
    assert await reason(joining, newcomer) == ErrorReason.ERROR_REASON_NAME_TAKEN
    assert before[0] == 1


async def test_a_name_whose_owner_stands_still_is_given_after_the_lease() -> None:
    joining = members()
    await joining.join(N1)
    await joining.join(replace(N1, incarnation="i9", address="127.0.0.99"))
    assert [node.incarnation for node in joining.view] == ["i9"]


async def test_a_dead_owner_is_replaced_at_once() -> None:
    joining = members(refused=True, lease=1000.0)
    await joining.join(N1)
    await joining.join(replace(N1, incarnation="i9", address="127.0.0.99"))
    assert [node.incarnation for node in joining.view] == ["i9"]


async def test_a_restart_at_the_same_address_joins_at_once() -> None:
    joining = members(lease=1000.0)
    await joining.join(N1)
    await joining.join(replace(N1, incarnation="i9"))
    assert [node.incarnation for node in joining.view] == ["i9"]
