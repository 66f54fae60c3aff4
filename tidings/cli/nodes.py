"""`tidings nodes`."""

from __future__ import annotations

import asyncio
import datetime
import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from tidings.cli.app import OK, PASS_ON, load_options, make_table, print_table

if TYPE_CHECKING:
    from tidings.cluster.node import Node

# Lines of news that stand below the table.
NEWS = 12

_COLOURS = {"up": "green", "joining": "yellow", "suspect": "yellow", "draining": "yellow", "failed": "red"}


@click.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list; with --watch, one object a line.")
@click.option("--watch", is_flag=True, help="Show what happens to them, live, until Ctrl-C.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def nodes(arguments: tuple[str, ...], as_json: bool, watch: bool) -> int:
    """List the nodes of the cluster, as the registry at --bind-address:--cluster-port knows them.

    \b
    Examples:
      tidings nodes --json
      tidings nodes --watch
    """
    options, _ = load_options(arguments)
    if watch:
        try:
            asyncio.run(_watch(options, as_json))
        except KeyboardInterrupt:
            pass
        return OK
    found = asyncio.run(_list(options))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return OK
    print_table(HEADER, [_cells(row) for row in found])
    return OK


HEADER = ("node", "address", "services", "state", "version", "strategy", "last update")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["hostname"], f"{row['address']}:{row['port']}", ", ".join(row["services"]),
        f"[{_COLOURS.get(row['state'], 'white')}]{row['state']}[/]", row["version"],
        row["strategy"] or "-", row["last_update"],
    )  # fmt: skip


async def _watch(options: Any, as_json: bool) -> None:
    """Each change as a line; on a terminal with the table above them, kept up to date."""
    from rich.console import Console
    from rich.live import Live

    from tidings.api.registry.v1 import registry_pb2 as pb
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import channel
    from tidings.kit.node_messages import node_from

    console = Console()
    known: dict[str, dict[str, Any]] = {}
    news: list[str] = []
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    async with channel(options) as opened:
        registry: Any = RegistryServiceStub(opened)
        call = registry.WatchNodes(pb.WatchNodesRequest())
        with live or nullcontext():
            async for update in call:
                if update.HasField("snapshot"):
                    known = {node.hostname: _row(node_from(node)) for node in update.snapshot.nodes}
                    happened = [("is there", row) for row in known.values()]
                else:
                    kind = pb.NodeChangeKind.Name(update.change.kind).removeprefix("NODE_CHANGE_KIND_").lower()
                    row = _row(node_from(update.change.node))
                    if kind != "left":
                        known[row["hostname"]] = row
                    elif known.get(row["hostname"], row)["incarnation"] == row["incarnation"]:
                        known.pop(row["hostname"], None)
                    happened = [(kind, row)]
                for what, row in happened:
                    _tell(console, live, news, what, row, update.view_version, as_json)
                if live is not None:
                    live.update(_picture(known, news), refresh=True)


def _tell(
    console: Any, live: Any, news: list[str], what: str, row: dict[str, Any], version: int, as_json: bool
) -> None:
    now = datetime.datetime.now().strftime("%H:%M:%S")
    if as_json:
        click.echo(json.dumps({"time": now, "view": version, "change": what, **row}))
        return
    colour = {"failed": "red", "joined": "green", "back": "green", "is there": "green"}.get(what, "yellow")
    line = f"{now}  view {version}  [bold]{row['hostname']}[/]  [{colour}]{what}[/]"
    if live is not None:
        news.append(line)
        del news[:-NEWS]
    else:
        console.print(line, highlight=False)


def _picture(known: dict[str, dict[str, Any]], news: list[str]) -> Any:
    from rich.console import Group
    from rich.text import Text

    table = make_table(HEADER, [_cells(row) for _, row in sorted(known.items())])
    return Group(table, Text(""), *(Text.from_markup(line) for line in news), Text("Ctrl-C ends", style="dim"))


async def _list(options: Any) -> list[dict[str, Any]]:
    from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import TIMEOUT, channel
    from tidings.kit.node_messages import node_from

    async with channel(options) as opened:
        registry: Any = RegistryServiceStub(opened)
        response = await registry.ListNodes(ListNodesRequest(), timeout=TIMEOUT)
    return [_row(node) for node in map(node_from, response.nodes)]


def _row(node: Node) -> dict[str, Any]:
    updated = datetime.datetime.fromtimestamp(node.last_update_unix_ms / 1000, datetime.UTC)
    return {
        "hostname": node.hostname, "address": node.address, "port": node.port,
        "incarnation": node.incarnation, "services": list(node.services), "state": node.state.value,
        "last_update": updated.strftime("%Y-%m-%dT%H:%M:%SZ"), "version": node.version,
        "strategy": node.strategy,
    }  # fmt: skip
