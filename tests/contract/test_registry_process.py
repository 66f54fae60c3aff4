"""A process that runs a registry: what it shares with others, and what it does not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.kit import membership
from tidings.kit.db import POOL_SIZE
from tidings.kit.options import load
from tidings.kit.own_node import own_place
from tidings.kit.runner import Process, select
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import free_port


async def test_beats_go_on_while_log_ins_hold_every_connection(
    mariadb: MariaDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "BEAT", 0.05)
    options = load(
        [
            f"--data-dir={tmp_path}", "--bind-address=127.0.0.11", f"--cluster-port={free_port('127.0.0.11')}",
            "--cluster-hostname=N1.test", "--admin-port=0", "--user-db=mysql",
            f"--user-db-uri={mariadb.create_database()}",
        ],
        {},
    )  # fmt: skip
    process = Process(options, select(["registry"]), own_place(options, ["registry"]), patience=20)
    await process.start()
    try:
        context = process.context
        assert context is not None
        registry: Any = RegistryServiceStub(context.channels.to(context.node))

        async def beat() -> int:
            (node,) = (await registry.ListNodes(ListNodesRequest(), timeout=5)).nodes
            assert node.hostname == "n1.test"
            return int(node.beat)

        async with AsyncExitStack() as storm:
            for _ in range(2 * POOL_SIZE):
                await storm.enter_async_context(context.database.read())
            first = await beat()
            async with asyncio.timeout(5):
                while await beat() < first + 5:
                    await asyncio.sleep(0.05)
    finally:
        await process.stop()
