"""`tidings drain`."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from tidings.cli.app import OK, PASS_ON, Failed, load_options, paragraph


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
    asyncio.run(_drain(options, words[0]))
    return OK


async def _drain(options: Any, hostname: str) -> None:
    from tidings.api.registry.v1.registry_pb2 import DrainNodeRequest, ListNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import TIMEOUT, channel

    async with channel(options) as opened:
        registry: Any = RegistryServiceStub(opened)
        request = DrainNodeRequest(hostname=hostname)
        incarnation = (await registry.DrainNode(request, timeout=TIMEOUT)).incarnation
        paragraph(f"{hostname} drains …")
        deadline = asyncio.get_running_loop().time() + options["drain-timeout"] + TIMEOUT
        while True:
            listed = await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)
            if incarnation not in (node.incarnation for node in listed.nodes):
                break
            if asyncio.get_running_loop().time() > deadline:
                raise Failed(f"{hostname} has not left after {options['drain-timeout']:.0f} s; see its log")
            await asyncio.sleep(0.1)
    paragraph(f"{hostname} has left.", "green")
