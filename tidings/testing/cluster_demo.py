"""A cluster to look at and to break: `make cluster`.

    python -m tidings.testing.cluster_demo [--name=value …]

Starts a MariaDB of its own and a node on each of 127.0.0.11, .12 and .13, says what is where, and shows the nodes
live until Ctrl-C. Then it ends what it has started, by process id, and removes its folder. --bind-address names
other addresses, one for each node; any other option is given to all nodes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from tidings.api.router.v1.account_pb2 import CreateAccountRequest
from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
from tidings.cli.app import Failed, Unreachable, report
from tidings.cli.client import TIMEOUT, channel
from tidings.cli.nodes import _watch
from tidings.kit.database_url import parse
from tidings.kit.options import Options, load, split_arguments
from tidings.kit.ports import PortInUse, port_holder
from tidings.testing.mariadb import MariaDB

ADDRESSES = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
START_TIMEOUT = 60.0
# Seconds for a node to hand over and leave, before it is killed; and between two looks for a node that answers.
STOP_TIMEOUT = 20.0
RETRY = 0.5
REMOVE_TIMEOUT = 5.0

# Option files and the environment of whoever runs this are not for these nodes.
NO_FILE = "--config="

QUERY = "select * from cluster_nodes"


class Node:
    """One `tidings run`, and how it is spoken to."""

    def __init__(self, number: int, address: str, folder: Path, file: Path, program: Sequence[str]) -> None:
        self.name = f"n{number}.test"
        self.address = address
        # What differs between the nodes; all else stands in the file.
        own = [f"--config={file}", f"--bind-address={address}", f"--data-dir={folder / f'n{number}'}"]
        self.line = [*program, "run", *own, f"--cluster-hostname={self.name}"]
        self._program = list(program)
        self._own = own
        self.log = folder / f"n{number}.log"
        self.options = load(own, {})
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, name: str) -> list[str]:
        """A command that speaks to this node."""
        return [*self._program, name, *self._own]

    def start(self) -> None:
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for us, who then end it in order.
            self.process = subprocess.Popen(
                self.line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait(self) -> None:
        """Waits until it serves. Raises Failed."""
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT
        while '"event": "serving"' not in (text := self.log.read_text(errors="replace")):
            if self.process.poll() is not None:
                raise Failed(f"{self.name} ended while it started:\n{text[-2000:].strip()}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} does not serve after {START_TIMEOUT:.0f} s:\n{text[-2000:].strip()}")
            time.sleep(0.05)


def main(arguments: Sequence[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    console = Console(highlight=False)
    with ExitStack() as undo:
        try:
            nodes = _start(arguments, console, undo)
            asyncio.run(_show(nodes))
        except KeyboardInterrupt:
            click.echo("\nending what was started …")
        except Exception as error:
            return report(error)
    return 0


def _start(arguments: Sequence[str], console: Console, undo: ExitStack) -> list[Node]:
    """Starts all and says what is where. Each undo is registered beside its do."""
    words, _ = split_arguments(arguments)
    options = load([NO_FILE, *words], {})
    addresses = options["bind-address"] or ADDRESSES
    for address in addresses:
        _check_ports(address, options)
    if shutil.which("mariadbd") is None:
        raise Failed("a database server is wanted: apt-get install mariadb-server-core mariadb-client-core")

    folder = Path(tempfile.mkdtemp(prefix="tidings-cluster-"))
    undo.callback(_remove, folder)
    with _step(console, "starting MariaDB"):
        database = _database(folder, undo)
    file = folder / "init.properties"
    common = [
        "--cluster-mode=true", "--user-db=mysql", f"--user-db-uri={database}",
        f"--admins=alice@{options['virt-hosts'][0]}",
        *(word for word in words if not word.startswith("--bind-address=")),
    ]  # fmt: skip
    file.write_text("# The same for every node.\n" + "\n".join(common) + "\n")

    nodes = [Node(number, address, folder, file, _program()) for number, address in enumerate(addresses, 1)]
    undo.callback(_end, nodes)
    for node in nodes:
        node.start()
    for node in nodes:
        with _step(console, f"starting {node.name} on {node.address}"):
            node.wait()
    accounts = [f"{name}@{options['virt-hosts'][0]}" for name in ("alice", "bob")]
    password = secrets.token_hex(4)
    asyncio.run(_add_accounts(nodes[0].options, accounts, password))
    _say(nodes, database, accounts, password, file)
    return nodes


def _remove(folder: Path) -> None:
    """Removes a folder, also one in which something that was interrupted still writes for a moment."""
    deadline = time.monotonic() + REMOVE_TIMEOUT
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


def _check_ports(address: str, options: Options) -> None:
    """Raises PortInUse for one that somebody holds, Failed for an address that this machine has not."""
    for option in ("c2s-ports", "c2s-tls-ports", "cluster-port", "admin-port"):
        ports = options[option] if isinstance(options[option], list) else [options[option]]
        for port in ports:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((address, port))
                    probe.listen()
                except PermissionError:
                    raise Failed(f"port {port} of {address} may only be used by root; set --{option}") from None
                except OSError as error:
                    if holder := port_holder(port, address):
                        raise PortInUse(address, port, holder, f"--{option}") from None
                    raise Failed(f"port {port} of {address} can't be used: {error.strerror}") from None


def _step(console: Console, what: str) -> AbstractContextManager[Any]:
    """Says what is waited for."""
    if console.is_terminal:
        return console.status(f"{what} …")
    click.echo(f"{what} …")
    return ExitStack()


def _database(folder: Path, undo: ExitStack) -> str:
    """A database of our own; its URI. Raises Failed."""
    server = MariaDB(folder)
    undo.callback(_stop_database, server)
    try:
        server.start()
    except (AssertionError, OSError, subprocess.CalledProcessError) as error:
        raise Failed(f"MariaDB does not start: {error}") from None
    return server.create_database()


def _stop_database(server: MariaDB) -> None:
    # What was started must end, however often somebody presses Ctrl-C now.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.stop()


def _program() -> list[str]:
    """How `tidings` is called here, as short as it can be typed."""
    script = Path(sys.executable).with_name("tidings")
    if not script.exists():
        return [sys.executable, "-m", "tidings"]
    return [os.path.relpath(script)] if script.is_relative_to(Path.cwd()) else [str(script)]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}


async def _add_accounts(options: Options, accounts: Sequence[str], password: str) -> None:
    async with channel(options) as opened:
        stub: Any = AccountServiceStub(opened)
        for jid in accounts:
            await stub.CreateAccount(CreateAccountRequest(jid=jid, password=password), timeout=TIMEOUT)


def _say(nodes: Sequence[Node], database: str, accounts: Sequence[str], password: str, file: Path) -> None:
    """What is where, and what can be done with it."""
    options, last = nodes[0].options, nodes[-1]
    url = parse(database)
    host, port = url.hosts[0]
    query = f"mysql -h {host} -P {port} -u {url.user} -p{url.password} {url.database} -e '{QUERY}'"
    drain = shlex.join([*nodes[0].command("drain"), last.name])
    plain, tls = options["c2s-ports"][0], options["c2s-tls-ports"][0]

    def bold(text: str) -> str:
        return click.style(text, bold=True)

    lines = [
        "",
        click.style(f"The cluster is up: {len(nodes)} nodes on one database.", bold=True, fg="green"),
        "",
        *(
            f"  {bold(node.name)}  clients {node.address}, port {plain} (STARTTLS) or {tls} (TLS);"
            f" cluster port {options['cluster-port']}; process {node.pid}"
            for node in nodes
        ),
        f"  Log in at any of them as {bold(accounts[0])} or {bold(accounts[1])}, password {bold(password)}.",
        f"  The certificates are self-made. {accounts[0]} administers: nodes that come and go are told to it.",
        "",
        bold("Each node was started by one line"),
        *(f"  {shlex.join(node.line)}" for node in nodes),
        f"  and what they have in common stands in {file}. Their logs are beside it.",
        "",
        bold("In another terminal"),
        f"  See the table      {bold(query)}",
        f"  Kill {last.name}       {bold(f'kill -9 {last.pid}')}   (the others know within a second)",
        f"  Have it leave      {bold(drain)}",
        "  Start it again     by its line above",
        "",
    ]
    click.echo("\n".join(lines))


async def _show(nodes: Sequence[Node]) -> None:
    """The table of nodes, as the first of them knows it that answers; for ever."""
    while True:
        for node in nodes:
            try:
                await _watch(node.options, False)
            except (Unreachable, Failed):
                continue  # it is gone: the next one knows
        await asyncio.sleep(RETRY)


def _end(nodes: Sequence[Node]) -> None:
    """SIGTERM to all that were started here; who is there after STOP_TIMEOUT, or at a second Ctrl-C, is killed."""
    running = [node.process for node in nodes if node.process is not None]
    deadline = time.monotonic() + STOP_TIMEOUT
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in running:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
