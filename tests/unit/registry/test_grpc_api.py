"""What the registry's API takes, from whom, and what it tells watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from services.registry import grpc_api
from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_memory import MemoryNodeStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.node_pb2 import NODE_STATE_UP
from tidings.api.registry.v1 import registry_pb2 as pb
from tidings.cluster.node import Node, NodeState
from tidings.kit import grpc_server
from tidings.kit.channel import Channels
from tidings.kit.db import DatabaseAway
from tidings.kit.identity import Caller
from tidings.kit.node_messages import node_into
from tidings.kit.pki import CertificateAuthority, normalised
from tidings.kit.rpc_errors import TidingsError

KEYS = CertificateAuthority.from_secret("a secret that is long enough").issue(["tidings:node:n1"], "n1")
CERTIFICATE = normalised(KEYS.certificate)
N1 = Node("n1", "i1", "127.0.0.11", 5777, ("router",), virtual_hosts=("example.org",), certificate=CERTIFICATE)
LOCAL = Caller("local", "n1")
JOINER = Caller("joiner", "n1", certificate=CERTIFICATE)


class Store(MemoryNodeStore):
    """A store whose database can be away."""

    away = False

    async def nodes(self) -> tuple[int, list[Node]]:
        if self.away:
            raise DatabaseAway("away")
        return await super().nodes()


@pytest.fixture
def members() -> Members:
    return Members(Store(), "own", 0.2)


@pytest.fixture
def api(members: Members) -> RegistryApi:
    return RegistryApi(members, Channels(KEYS, "own", None))


def called_by(caller: Caller) -> None:
    grpc_server._caller.set(caller)


async def join(api: RegistryApi, caller: Caller = LOCAL, **differences: Any) -> None:
    called_by(caller)
    request = pb.JoinRequest()
    node_into(replace(N1, **differences), request.node)
    await api.Join(request, None)


async def reason(call: Any) -> int:
    with pytest.raises(TidingsError) as error:
        await call
    return error.value.reason


# --- joining ---


@pytest.mark.parametrize(
    "differences",
    [
        {"address": "a..b"},
        {"address": "a" * 64 + ".example.org"},
        {"address": "127.0.0.1\0"},
        {"address": "http://n1"},
        {"address": ""},
        {"hostname": "n1/router"},
        {"hostname": ""},
        {"port": 0},
        {"port": 65536},
        {"state": NodeState.UP},
        {"state": NodeState.DRAINING},
    ],
    ids=str,
)
async def test_a_row_that_nobody_can_dial_or_that_is_not_joining_is_refused(
    api: RegistryApi, members: Members, differences: dict[str, Any]
) -> None:
    assert await reason(join(api, **differences)) == ErrorReason.ERROR_REASON_BAD_REQUEST
    assert (await members.refresh()).version == 0


@pytest.mark.parametrize("address", ["127.0.0.11", "::1", "n1", "n1.example.org", "node_1.example.org"])
async def test_what_can_be_dialled_is_taken(api: RegistryApi, members: Members, address: str) -> None:
    await join(api, address=address)
    assert [node.address for node in members.view] == [address]


async def test_names_are_compared_without_case_as_mysql_does(api: RegistryApi, members: Members) -> None:
    upper = replace(JOINER, name="N1")
    await join(api, upper, hostname="N1")
    assert [node.hostname for node in members.view] == ["n1"]
    beat = pb.BeatRequest(hostname="N1", incarnation="i1", state=NODE_STATE_UP)
    for caller in (upper, Caller("node", "n1", incarnation="i1")):
        called_by(caller)
        await api.Beat(beat, None)
    await api.Leave(pb.LeaveRequest(hostname="N1", incarnation="i1"), None)
    assert len(members.view) == 0


# --- who speaks for whom ---


async def test_who_has_failed_or_is_gone_is_told_so(api: RegistryApi, members: Members) -> None:
    """Its certificate makes it no node any more, but one that may join."""
    await join(api, JOINER)
    called_by(JOINER)
    beat = pb.BeatRequest(hostname="n1", incarnation="i1", state=NODE_STATE_UP)
    await api.Beat(beat, None)
    await members._store.mark("n1", "i1", 1, NodeState.FAILED)
    assert await reason(api.Beat(beat, None)) == ErrorReason.ERROR_REASON_NOT_A_MEMBER
    await members._store.leave("n1", "i1")
    assert await reason(api.Beat(beat, None)) == ErrorReason.ERROR_REASON_NOT_A_MEMBER


@pytest.mark.parametrize("caller", [Caller("joiner", "n2"), Caller("node", "n2", incarnation="i2")])
async def test_nobody_beats_or_leaves_for_another(api: RegistryApi, caller: Caller) -> None:
    await join(api)
    called_by(caller)
    refused = ErrorReason.ERROR_REASON_NOT_ALLOWED
    beat = pb.BeatRequest(hostname="n1", incarnation="i1", state=NODE_STATE_UP)
    assert await reason(api.Beat(beat, None)) == refused
    assert await reason(api.Leave(pb.LeaveRequest(hostname="n1", incarnation="i1"), None)) == refused


async def test_a_node_does_not_beat_for_an_earlier_start_of_its_own(api: RegistryApi) -> None:
    await join(api)
    called_by(Caller("node", "n1", incarnation="i2"))
    beat = pb.BeatRequest(hostname="n1", incarnation="i1", state=NODE_STATE_UP)
    assert await reason(api.Beat(beat, None)) == ErrorReason.ERROR_REASON_NOT_ALLOWED


# --- watching ---


async def some(updates: AsyncIterator[pb.WatchNodesResponse], count: int) -> list[tuple[int, str]]:
    """The next updates: the version, and what it is about."""
    found = []
    async with asyncio.timeout(5):
        while len(found) < count:
            update = await anext(updates)
            about = update.change.node.hostname if update.HasField("change") else "snapshot"
            found.append((update.view_version, about))
    return found


async def test_with_the_database_away_the_last_view_is_told_to_whom_it_is_not_older(
    api: RegistryApi, members: Members
) -> None:
    await join(api)
    await join(api, hostname="n2", incarnation="i2")
    members._store.away = True  # type: ignore[attr-defined]
    members.away_since = 0.0
    assert [node.hostname for node in (await api.ListNodes(pb.ListNodesRequest(), None)).nodes] == ["n1", "n2"]
    for since in (0, 1):
        assert await some(api.WatchNodes(pb.WatchNodesRequest(since=since), None), 1) == [(2, "snapshot")]
    newer = api.WatchNodes(pb.WatchNodesRequest(since=3), None)
    assert await reason(anext(newer)) == ErrorReason.ERROR_REASON_DATABASE_AWAY
    # Who has this very view gets what comes after it.
    watch = api.WatchNodes(pb.WatchNodesRequest(since=2), None)
    news = asyncio.create_task(some(watch, 1))
    await asyncio.sleep(0)
    members._store.away = False  # type: ignore[attr-defined]
    await join(api, hostname="n3", incarnation="i3")
    assert await news == [(3, "n3")]


async def test_a_watcher_that_is_too_slow_is_cut_off_and_misses_nothing(
    api: RegistryApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_api, "MAX_WAITING", 2)
    await join(api)
    watch = api.WatchNodes(pb.WatchNodesRequest(), None)
    assert await some(watch, 1) == [(1, "snapshot")]
    for number in range(2, 6):
        await join(api, hostname=f"n{number}", incarnation=f"i{number}")
    seen = [update.view_version async for update in watch]
    again = api.WatchNodes(pb.WatchNodesRequest(since=max(seen, default=1)), None)
    assert [*seen, *(version for version, _ in await some(again, 4 - len(seen)))] == [2, 3, 4, 5]


async def test_when_changes_are_lost_the_stream_ends_and_the_next_one_begins_with_a_snapshot(
    api: RegistryApi, members: Members
) -> None:
    for number in range(1, 4):
        await join(api, hostname=f"n{number}", incarnation=f"i{number}")
    watch = api.WatchNodes(pb.WatchNodesRequest(), None)
    assert await some(watch, 1) == [(3, "snapshot")]
    members._store = Store()
    await join(api)
    with pytest.raises(StopAsyncIteration):
        await some(watch, 1)
    assert await some(api.WatchNodes(pb.WatchNodesRequest(since=3), None), 1) == [(1, "snapshot")]
