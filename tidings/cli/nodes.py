"""`tidings nodes`."""

from __future__ import annotations

import asyncio
import datetime
import json
from typing import Any

import click

from tidings.cli.app import OK, PASS_ON, load_options, print_table

_COLOURS = {"up": "green", "joining": "yellow", "suspect": "yellow", "draining": "yellow", "failed": "red"}


@click.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def nodes(arguments: tuple[str, ...], as_json: bool) -> int:
    """List the nodes of the cluster, as the registry at --bind-address:--cluster-port knows them.

    Example: tidings nodes --json
    """
    options, _ = load_options(arguments)
    found = asyncio.run(_list(options))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return OK
    print_table(
        ("node", "address", "services", "state", "version", "strategy", "last update"),
        [
            (
                row["hostname"], f"{row['address']}:{row['port']}", ", ".join(row["services"]),
                f"[{_COLOURS.get(row['state'], 'white')}]{row['state']}[/]", row["version"],
                row["strategy"] or "-", row["last_update"],
            )
            for row in found
        ],
    )  # fmt: skip
    return OK


async def _list(options: Any) -> list[dict[str, Any]]:
    from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import TIMEOUT, channel
    from tidings.kit.node_messages import node_from

    async with channel(options) as opened:
        registry: Any = RegistryServiceStub(opened)
        response = await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)
    rows = []
    for node in map(node_from, response.nodes):
        updated = datetime.datetime.fromtimestamp(node.last_update_unix_ms / 1000, datetime.UTC)
        rows.append(
            {
                "hostname": node.hostname, "address": node.address, "port": node.port,
                "incarnation": node.incarnation, "services": list(node.services), "state": node.state.value,
                "last_update": updated.strftime("%Y-%m-%dT%H:%M:%SZ"), "version": node.version,
                "strategy": node.strategy,
            }
        )  # fmt: skip
    return rows
