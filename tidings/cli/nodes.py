"""`tidings nodes`."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from typing import TYPE_CHECKING, Any

import click

from tidings.cli.app import OK, PASS_ON, load_options, make_table, print_table

if TYPE_CHECKING:
    from tidings.cluster.node import Node

# Lines of news that stand below the table.
NEWS = 12
# Seconds between two rounds in which no registry answers.
RETRY = 0.5

_COLOURS = {"up": "green", "joining": "yellow", "suspect": "yellow", "draining": "yellow", "failed": "red"}
_TROUBLES = ("suspect", "draining", "failed")


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
            asyncio.run(_watch(options, as_json, for_ever=True))
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


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    from rich.text import Text

    return (
        row["hostname"], f"{row['address']}:{row['port']}", ", ".join(row["services"]),
        Text(row["state"], style=_COLOURS.get(row["state"], "white")), row["version"],
        row["strategy"] or "-", row["last_update"],
    )  # fmt: skip


async def _watch(options: Any, as_json: bool, for_ever: bool = False) -> None:
    """Each change as a line; on a terminal with the table above them, kept up to date. `for_ever`: also when the
    registry goes that is asked; else that raises Unreachable."""
    from rich.console import Console
    from rich.live import Live

    from tidings.api.registry.v1 import registry_pb2 as pb
    from tidings.kit.node_messages import node_from

    console = Console()
    known: dict[str, dict[str, Any]] = {}
    news: list[Any] = []
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    async with aclosing(_updates(options, for_ever)) as updates:
        with live or nullcontext():
            async for update in updates:
                if update.HasField("snapshot"):
                    now = {node.hostname: _row(node_from(node)) for node in update.snapshot.nodes}
                    happened = _happened(known, now)
                    known = now
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


def _happened(known: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """What a whole list says that was not known, by name; who has failed is in the list, and not there."""
    happened = []
    for name, row in now.items():
        before = known.get(name)
        if before is None or any(row[key] != before[key] for key in ("incarnation", "state")):
            happened.append((row["state"] if row["state"] in _TROUBLES else "is there", row))
    return happened + [("left", row) for name, row in known.items() if name not in now]


async def _updates(options: Any, for_ever: bool) -> AsyncGenerator[Any, None]:
    """What the registry that commands talk to tells; when it goes, what any of the cluster tells from there on."""
    import grpc

    from tidings.api.registry.v1.registry_pb2 import WatchNodesRequest
    from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
    from tidings.cli.client import GONE, channel, channels_to_registries

    since = 0
    nodes: dict[str, Any] = {}
    async with channel(options) as opened:
        while True:
            async with channels_to_registries(options, nodes.values()) as others:
                for one in (opened, *others):
                    registry: Any = RegistryServiceStub(one)
                    try:
                        async for update in registry.WatchNodes(WatchNodesRequest(since=since)):
                            since = update.view_version
                            changed = [update.change.node] if update.HasField("change") else update.snapshot.nodes
                            nodes.update({node.hostname: node for node in changed})
                            yield update
                    except grpc.aio.AioRpcError as error:
                        if not (since and for_ever) or error.code() not in GONE:
                            raise
            await asyncio.sleep(RETRY)


def _tell(
    console: Any, live: Any, news: list[Any], what: str, row: dict[str, Any], version: int, as_json: bool
) -> None:
    from rich.text import Text

    now = datetime.datetime.now().strftime("%H:%M:%S")
    if as_json:
        click.echo(json.dumps({"time": now, "view": version, "change": what, **row}))
        return
    colour = {"failed": "red", "joined": "green", "back": "green", "is there": "green"}.get(what, "yellow")
    line = Text.assemble(f"{now}  view {version}  ", (row["hostname"], "bold"), "  ", (what, colour))
    if live is not None:
        news.append(line)
        del news[:-NEWS]
    else:
        console.print(line, highlight=False)


def _picture(known: dict[str, dict[str, Any]], news: list[Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    table = make_table(HEADER, [_cells(row) for _, row in sorted(known.items())])
    return Group(table, Text(""), *news, Text("Ctrl-C ends", style="dim"))


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
