"""How the registry is put together."""

from __future__ import annotations

from typing import Any

import grpc

from services.registry.grpc_api import RegistryApi
from services.registry.members import CONFIRM_TIMEOUT, Members
from services.registry.store_sql import SqlNodeStore
from tidings.api.registry.v1.registry_pb2 import DESCRIPTOR, ProbeNodeRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub, add_RegistryServiceServicer_to_server
from tidings.cluster.node import Node
from tidings.kit.migrations import migrate
from tidings.kit.rpc_errors import describe
from tidings.kit.service import Context


def build(context: Context) -> Registry:
    return Registry(context)


class Registry:
    """The registry service."""

    def __init__(self, context: Context) -> None:
        self._database = context.database
        self._tasks = context.tasks
        self._channels = context.channels
        self._members = Members(
            SqlNodeStore(context.database),
            context.node.incarnation,
            context.options["cluster-lease"],
            confirm=self._confirm,
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
        await migrate(self._database, "registry", "services.registry:migrations")
        await self._members.refresh()
        self._tasks.spawn(self._members.run(), "registry: watch the table")

    async def _confirm(self, asked: Node, node: Node) -> bool:
        """Has another registry's node look at a node. Raises TimeoutError when it can't be asked."""
        stub: Any = RegistryServiceStub(self._channels.to(asked))
        request = ProbeNodeRequest(hostname=node.hostname, incarnation=node.incarnation)
        try:
            return bool((await stub.ProbeNode(request, timeout=CONFIRM_TIMEOUT)).refused)
        except grpc.RpcError as error:
            raise TimeoutError(describe(error)) from None

    async def drain(self) -> None:
        """Others ask another registry; nothing is to be handed over."""

    async def stop(self) -> None:
        """Its tasks belong to the process."""
