"""`tidings drain`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from tidings.cli.app import OK, PASS_ON, Failed, load_options, paragraph

# Seconds between two looks whether it has left.
LOOK = 0.1


@click.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def drain(arguments: tuple[str, ...]) -> int:
    """Have a node take nothing new, hand over what it has, leave the cluster and end.

    The registry at --bind-address:--cluster-port passes it on; so does SIGTERM to the node itself.
    Example: tidings drain n2.example.org
    """
    options, words = load_options(arguments)
    if len(words) != 1:
        raise Failed("name one node, as `tidings nodes` lists it: tidings drain n2.example.org")
    asyncio.run(_drain(options, words[0].lower()))
    return OK


async def _drain(options: Any, hostname: str) -> None:
    from tidings.api.registry.v1.registry_pb2 import DrainNodeRequest, ListNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import TIMEOUT, channel, channels_to_registries

    async with channel(options) as opened:
        registry: Any = RegistryServiceStub(opened)
        nodes = (await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)).nodes
        request = DrainNodeRequest(hostname=hostname)
        incarnation = (await registry.DrainNode(request, timeout=TIMEOUT)).incarnation
        paragraph(f"{hostname} drains …")
        own_registry = any(node.hostname == hostname and "registry" in node.services for node in nodes)
        deadline = asyncio.get_running_loop().time() + options["drain-timeout"] + TIMEOUT
        async with channels_to_registries(options, nodes) as others:
            registries = [registry, *map(RegistryServiceStub, others)]
            while await _is_there(incarnation, registries, own_registry):
                if asyncio.get_running_loop().time() > deadline:
                    raise Failed(f"{hostname} has not left after {options['drain-timeout']:.0f} s; see its log")
                await asyncio.sleep(LOOK)
    paragraph(f"{hostname} has left.", "green")


async def _is_there(incarnation: str, registries: list[Any], own_registry: bool) -> bool:
    """Whether a draining node is still in the cluster, by the first registry that answers. Where none does, the last
    one has gone: the node's own, if it runs one."""
    import grpc

    from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
    from tidings.cli.client import GONE, TIMEOUT

    for number, registry in enumerate(registries, 1):
        try:
            listed = await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() not in GONE or (number == len(registries) and not own_registry):
                raise
        else:
            return incarnation in (node.incarnation for node in listed.nodes)
    return False
