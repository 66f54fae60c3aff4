"""How the registry is put together."""

from __future__ import annotations

from typing import Any

import grpc

from services.registry.grpc_api import RegistryApi
from services.registry.members import Members
from services.registry.store_sql import SqlNodeStore
from services.registry.witnesses import ASK_TIMEOUT
from tidings.api.node.v1.node_pb2 import ProbeRequest
from tidings.api.node.v1.node_pb2_grpc import NodeServiceStub
from tidings.api.registry.v1.registry_pb2 import DESCRIPTOR
from tidings.api.registry.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from tidings.cluster.node import Node
from tidings.kit.db import Database
from tidings.kit.migrations import migrate
from tidings.kit.probe import Outcome
from tidings.kit.rpc_errors import describe
from tidings.kit.service import Context


def build(context: Context) -> Registry:
    return Registry(context)


class Registry:
    """The registry service."""

    def __init__(self, context: Context) -> None:
        self._shared_database = context.database
        # A storm of log-ins must not hold up beats. SQLite has one writer anyway.
        self._database = (
            context.database if context.database.sqlite else Database(context.database.url, connections=4)
        )
        self._tasks = context.tasks
        self._channels = context.channels
        self._members = Members(
            SqlNodeStore(self._database),
            context.node.incarnation,
            context.options["cluster-lease"],
            ask=self._ask,
            spawn=context.tasks.spawn,
        )
        context.server.add(
            add_RegistryServiceServicer_to_server,
            RegistryApi(self._members, context.channels),
            DESCRIPTOR.services_by_name["RegistryService"].full_name,
        )
        context.metrics.gauged("view_nodes", "Nodes in the registry's view", lambda: len(self._members.view))
        context.metrics.gauged("view_version", "Version of the registry's view", lambda: self._members.view.version)

    async def start(self) -> None:
        await migrate(self._shared_database, "registry", "services.registry:migrations")
        if self._database is not self._shared_database:
            await self._database.start()
        try:
            await self._members.refresh()
        except BaseException:
            await self._close_database()
            raise
        self._tasks.spawn(self._watch_table(), "registry: watch the table")

    async def _watch_table(self) -> None:
        try:
            await self._members.run()
        finally:
            # Only now does nobody call any more.
            await self._close_database()

    async def _close_database(self) -> None:
        if self._database is not self._shared_database:
            await self._database.stop()

    async def _ask(self, asked: Node, node: Node) -> Outcome:
        """Has another node connect to a node. Raises TimeoutError when it can't be asked."""
        stub: Any = NodeServiceStub(self._channels.to(asked))
        request = ProbeRequest(address=node.address, port=node.port)
        try:
            return Outcome((await stub.Probe(request, timeout=ASK_TIMEOUT)).outcome)
        except (grpc.RpcError, ValueError) as error:
            raise TimeoutError(describe(error) if isinstance(error, grpc.RpcError) else str(error)) from None

    async def drain(self) -> None:
        """Others ask another registry; nothing is to be handed over."""

    async def stop(self) -> None:
        """Its tasks belong to the process."""
