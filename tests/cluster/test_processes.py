"""All cores of one machine (`--processes`): real processes behind shared client ports. Times are printed: pytest -s."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import texts
from tidings.testing.client import Closed, RawClient
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, Installation, free_port

START_TIMEOUT = 60.0


def free_ports(address: str, count: int) -> int:
    """The first of so many ports in a row that nobody uses now."""
    while True:
        first = free_port(address)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind((address, port))
            return first
        except (OSError, OverflowError):
            continue


class Machine(Installation):
    """One machine with several processes behind one supervisor."""

    def __init__(
        self, folder: Path, count: int, *options: str, address: str = "127.0.0.71", **variables: str
    ) -> None:
        """`variables`: what the supervisor finds in its environment."""
        folder.mkdir(exist_ok=True)
        super().__init__(ONE_PROCESS, folder, options)
        self.count = count
        self.address = self.router_address = self.registry_address = address
        self.port, self.tls_port = free_port(address), free_port(address)
        self.cluster_port, self.admin_port = free_ports(address, count), free_ports(address, count)
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind("")
        self.variables = variables

    def environment(self, node: int = 0) -> dict[str, str]:
        return {
            **super().environment(node),
            **self.variables,
            "NOTIFY_SOCKET": "@" + self.notices.getsockname()[1:].decode(),
        }

    def begin(self) -> None:
        self.spawn("all", [f"--processes={self.count}", f"--bind-address={self.address}"])

    def serve(self) -> None:
        """Starts all, and waits until the supervisor says that all serve."""
        started = time.monotonic()
        self.begin()
        self.notices.settimeout(0.05)
        while True:
            try:
                assert self.notices.recv(100) == b"READY=1"
                break
            except TimeoutError:
                assert self.supervisor.poll() is None, self.log("all")[-4000:]
                assert time.monotonic() - started < START_TIMEOUT, self.log("all")[-4000:]
        print(f"\n{self.count} processes serve after {time.monotonic() - started:.1f} s")

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        return self.processes["all"]

    def children(self) -> dict[str, psutil.Process]:
        """By their names."""
        found = {}
        for process in psutil.Process(self.supervisor.pid).children():
            named = re.search(r"--cluster-hostname=([a-z]+[0-9]+)\.", " ".join(process.cmdline()))
            if named is not None:
                found[named[1]] = process
        return found

    def metric(self, number: int, name: str) -> int:
        """A metric of the process with that number, routers first."""
        with urllib.request.urlopen(f"http://{self.address}:{self.admin_port + number}/metrics", timeout=5) as answer:
            found = re.search(rf"^tidings_{name} (\S+)$", answer.read().decode(), re.M)
        assert found is not None, name
        return int(float(found[1]))

    async def client(self, name: str, password: str = "secret", timeout: float = 20.0) -> RawClient:
        """A session that has sent presence; tried until the server lets it in."""
        async with asyncio.timeout(timeout):
            while True:
                client = RawClient(self.address, self.port, "localhost")
                try:
                    await client.log_in(name, password)
                    await client.send("<presence/>")
                    await client.ping()
                    return client
                except (Closed, OSError, AssertionError, TimeoutError):
                    await client.abort()
                    await asyncio.sleep(0.05)


@pytest.fixture
def machine_of(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines; what still runs at the end is ended by its id."""
    made: list[Machine] = []

    def make(count: int, *options: str, folder: str = "machine", **named: str) -> Machine:
        made.append(Machine(tmp_path / folder, count, *options, **named))
        return made[-1]

    yield make
    for machine in made:
        machine.stop()
        machine.notices.close()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(processes: list[psutil.Process], timeout: float = 5.0) -> float:
    """Waits until none of these processes is there any more; the seconds that it took."""
    started = time.monotonic()
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() - started < timeout, left
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def chat(machine: Machine, count: int) -> list[RawClient]:
    """Clients, each of which writes to each other one; all must get all, in order."""
    names = [f"user{number}" for number in range(count)]
    await machine.add_accounts(*(f"{name}@localhost" for name in names))
    clients = [await machine.client(name) for name in names]
    for sender in clients:
        for receiver in clients:
            if receiver is not sender:
                for number in range(3):
                    text = f"{sender.jid} {number}"
                    await sender.send(f"<message to='{receiver.jid}' type='chat'><body>{text}</body></message>")
    for receiver in clients:
        got = await texts(receiver, 3 * (count - 1))
        assert sorted(got) == sorted(
            f"{other.jid} {n}" for other in clients if other is not receiver for n in range(3)
        )
        for other in clients:
            ordered = [text for text in got if text.startswith(f"{other.jid} ")]
            assert ordered == sorted(ordered)
    return clients


async def test_three_processes_share_the_client_ports_and_are_one_server(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(3)
    machine.serve()
    assert sorted(machine.children()) == ["connector1", "connector2", "router1"]
    clients = await chat(machine, 14)
    streams = [machine.metric(number, "streams") for number in (1, 2)]
    assert sum(streams) == 14
    assert 0 not in streams, "the kernel gives each connector its share"
    assert machine.metric(0, "sessions") == 14
    # The first start made an account, as it does in one process.
    password = (machine.folder / "data" / "admin-password").read_text().strip()
    await (await machine.client("admin", password)).close()
    processes = list(machine.children().values())
    stopped = time.monotonic()
    machine.supervisor.send_signal(signal.SIGTERM)
    for client in clients:
        assert (await client.closed()).condition == "system-shutdown"
    assert machine.supervisor.wait(20) == 0
    print(f"stopped after {time.monotonic() - stopped:.1f} s")
    await gone(processes)
    assert '"level": "error"' not in machine.log("all")


async def test_two_routers_share_the_users_on_one_sqlite_file(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(7, "--debug=cluster")
    machine.serve()
    clients = await chat(machine, 12)
    sessions = [machine.metric(number, "sessions") for number in (0, 1)]
    print(f"sessions of the routers: {sessions}")
    assert sum(sessions) == 12
    assert 0 not in sessions
    assert machine.metric(0, "view_nodes") == 7
    # When one of them dies, the other takes its sessions over, and clients notice a pause.
    machine.children()["router1"].kill()
    for client in clients:
        await client.ping()
    await clients[0].send(f"<message to='{clients[1].jid}' type='chat'><body>again</body></message>")
    assert await texts(clients[1], 1) == ["again"]
    machine.supervisor.send_signal(signal.SIGTERM)
    assert machine.supervisor.wait(20) == 0


@pytest.mark.parametrize("killed", ["connector1", "router1"])
async def test_a_killed_process_is_started_again_and_clients_come_back(
    machine_of: Callable[..., Machine], killed: str
) -> None:
    machine = machine_of(2)
    machine.serve()
    await machine.add_accounts("alice@localhost", "bob@localhost")
    alice = await machine.client("alice")
    before = machine.children()
    started = time.monotonic()
    before[killed].kill()
    if killed == "router1":
        # Its connector brings the session to the router that is started in its place.
        await alice.ping()
        clients = [alice, await machine.client("bob")]
    else:
        await alice.closed()
        clients = [await machine.client(name) for name in ("alice", "bob")]
    print(f"\n{killed} killed: clients are back after {time.monotonic() - started:.1f} s")
    await clients[0].send(f"<message to='{clients[1].jid}' type='chat'><body>again</body></message>")
    assert await texts(clients[1], 1) == ["again"]
    after = machine.children()
    assert {name for name in before if after[name].pid != before[name].pid} == {killed}
    died = [line for line in machine.log("all").splitlines() if '"process_died"' in line]
    assert len(died) == 1
    assert f'"process": "{killed}"' in died[0]
    assert '"exit_code": -9' in died[0]
    machine.supervisor.send_signal(signal.SIGTERM)
    assert machine.supervisor.wait(20) == 0
    await gone(list(after.values()))


async def test_no_process_outlives_a_killed_supervisor(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(3)
    machine.serve()
    children = list(machine.children().values())
    assert len(children) == 3
    machine.supervisor.kill()
    print(f"\nall gone {await gone(children) * 1000:.0f} ms after the supervisor was killed")
    machine.supervisor.wait()


async def test_a_supervisor_killed_while_it_starts_leaves_nobody(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(3)
    machine.begin()
    while len(psutil.Process(machine.supervisor.pid).children()) < 3:
        await asyncio.sleep(0.005)
    children = psutil.Process(machine.supervisor.pid).children()
    machine.supervisor.kill()
    machine.supervisor.wait()
    await gone(children)


async def test_a_process_that_is_drained_leaves_alone_and_stays_away(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(3)
    machine.serve()
    await machine.add_account("alice@localhost")
    name = next(node for node in re.findall(r'"node": "(\S+)"', machine.log("all")) if node.startswith("connector1."))
    drained = subprocess.run(
        [sys.executable, "-m", "tidings", "drain", name, f"--bind-address={machine.address}", *machine.arguments()],
        capture_output=True, text=True, timeout=30, env=machine.environment(), cwd=machine.folder,
    )  # fmt: skip
    assert drained.returncode == 0, drained.stderr
    while '"process_left"' not in machine.log("all"):
        await asyncio.sleep(0.01)
    assert sorted(machine.children()) == ["connector2", "router1"]
    for _ in range(8):
        await (await machine.client("alice", timeout=5)).close()
    assert '"process_died"' not in machine.log("all")


async def test_a_taken_client_port_is_not_shared_with_strangers(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(2)
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((machine.address, machine.port))
        held.listen()
        machine.begin()
        assert machine.supervisor.wait(20) == 1
    assert f"port {machine.port} of {machine.address} is in use by" in machine.log("all")
    assert '"serving"' not in machine.log("all")


async def test_a_start_that_fails_ends_all_with_its_exit_code(machine_of: Callable[..., Machine]) -> None:
    machine = machine_of(3)
    with socket.socket() as held:
        held.bind((machine.address, machine.cluster_port + 2))
        held.listen()
        machine.begin()
        assert machine.supervisor.wait(30) == 1
    log = machine.log("all")
    assert f"port {machine.cluster_port + 2} of {machine.address} is in use by" in log
    assert '"process_failed"' in log
    assert '"process_died"' not in log


async def test_a_first_start_on_a_terminal_says_once_what_one_process_says(
    machine_of: Callable[..., Machine],
) -> None:
    machine = machine_of(2)
    controller, terminal = pty.openpty()
    supervisor = subprocess.Popen(
        [
            "setsid", "--ctty", sys.executable, "-m", "tidings", "run", "--processes=2",
            f"--bind-address={machine.address}", f"--admin-port={machine.admin_port}", *machine.arguments(),
        ],
        stdin=terminal, stdout=terminal, stderr=terminal, env=machine.environment(), cwd=machine.folder,
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(controller, False)
    shown = ""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while "self-made: clients" not in shown:
                assert supervisor.poll() is None, shown
                try:
                    shown += os.read(controller, 65536).decode(errors="replace")
                except BlockingIOError:
                    await asyncio.sleep(0.01)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert plain.count("Tidings is running.") == 1
        password = re.search(r"Account +admin@localhost, password (\S+) ", plain)
        assert password is not None, plain
        await (await machine.client("admin", password[1])).close()
        assert not (machine.folder / "data" / "admin-password").exists()
        # What it says to type works.
        command = re.search(r"see it with \S+ (nodes .*)", plain)
        assert command is not None, plain
        listed = subprocess.run(
            [sys.executable, "-m", "tidings", *command[1].split(), "--json"],
            capture_output=True, text=True, timeout=30, env=machine.environment(), cwd=machine.folder,
        )  # fmt: skip
        assert listed.stdout.count('"up"') == 2, listed.stderr
        children = psutil.Process(supervisor.pid).children()
        os.write(controller, b"\x03")
        assert supervisor.wait(20) == 0, "Ctrl-C is for the supervisor alone, and it stops all"
        await gone(children)
    finally:
        supervisor.kill()
        supervisor.wait()
        os.close(controller)


@pytest.mark.whole
async def test_two_machines_with_processes_are_one_cluster(
    machine_of: Callable[..., Machine], mariadb: MariaDB
) -> None:
    """Each process has a row of its own, and users of both machines reach each other."""
    uri = mariadb.create_database()
    machines = [
        machine_of(
            2, f"--cluster-hostname=m{number}.test", f"--cluster-host=m{number}", folder=f"m{number}",
            address=f"127.0.0.{71 + number}", TIDINGS_CLUSTER_MODE="true", TIDINGS_USER_DB="mysql", TIDINGS_USER_DB_URI=uri,
        )
        for number in (1, 2)
    ]  # fmt: skip
    for machine in machines:
        machine.begin()
    for machine in machines:
        deadline = time.monotonic() + START_TIMEOUT
        while machine.log("all").count('"event": "serving"') < 2:
            assert machine.supervisor.poll() is None, machine.log("all")[-4000:]
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert uri not in "".join(" ".join(child.cmdline()) for child in machine.children().values())
    async with asyncio.timeout(5):
        while machines[0].metric(0, "view_nodes") != 4:
            await asyncio.sleep(0.05)
    await machines[0].add_accounts(*(f"u{number}@localhost" for number in range(6)))
    clients = [await machines[number % 2].client(f"u{number}") for number in range(6)]
    for sender in clients:
        for receiver in clients:
            await sender.send(f"<message to='{receiver.jid}' type='chat'><body>{sender.jid}</body></message>")
    for receiver in clients:
        assert sorted(await texts(receiver, 6)) == sorted(client.jid for client in clients)
    for machine in machines:
        machine.supervisor.send_signal(signal.SIGTERM)
    assert [machine.supervisor.wait(20) for machine in machines] == [0, 0]
