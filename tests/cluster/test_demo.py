"""`make cluster`, as somebody at a terminal sees it; on other addresses and ports, so that both can run."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tidings.testing.client import RawClient
from tidings.testing.server import free_port

ADDRESSES = ("127.0.0.31", "127.0.0.32", "127.0.0.33")

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """The demonstration, run in a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.port = free_port(ADDRESSES[0])
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tidings.testing.cluster_demo", f"--bind-address={','.join(ADDRESSES)}",
                f"--c2s-ports={self.port}", f"--c2s-tls-ports={free_port(ADDRESSES[0])}",
                f"--cluster-port={free_port(ADDRESSES[0])}", "--admin-port=0", *options,
            ],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Reads until something is on the screen that matches."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.seen}"
            if select.select([self._master], [], [], 0.05)[0]:
                try:
                    self.seen += _CODES.sub("", os.read(self._master, 65536).decode(errors="replace"))
                except OSError:  # the other side has ended
                    raise AssertionError(f"it ended without {pattern!r}:\n{self.seen}") from None
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(40)
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    started = Terminal("--scram-iterations=4096")
    yield started
    started.close()


async def chat(port: int, password: str) -> str:
    """Alice at one node writes to Bob at another; what Bob gets."""
    alice, bob = RawClient(ADDRESSES[0], port, "localhost"), RawClient(ADDRESSES[1], port, "localhost")
    try:
        await alice.log_in("alice", password)
        await bob.log_in("bob", password)
        await alice.send(f"<message to='{bob.jid}' type='chat'><body>But soft!</body></message>")
        return (await bob.element()).findtext("{jabber:client}body") or ""
    finally:
        await alice.abort()
        await bob.abort()


def test_three_nodes_start_are_shown_live_and_leave_nothing_behind(terminal: Terminal) -> None:
    password = terminal.until(r"The cluster is up: 3 nodes(?s:.*)password ([0-9a-f]+)")[1]
    folder = Path(terminal.until(r"stands in (\S+)/init\.properties")[1])
    doomed = int(terminal.until(r"kill -9 ([0-9]+)")[1])
    mine = psutil.Process(terminal.process.pid).children(recursive=True)
    assert len(mine) == 4, "a database and three nodes"
    assert folder.exists()

    assert asyncio.run(chat(terminal.port, password)) == "But soft!"

    terminal.until("Ctrl-C ends")
    assert doomed in [process.pid for process in mine]
    os.kill(doomed, signal.SIGKILL)
    terminal.until(r"n3\.test\s+failed", 10)

    terminal.process.send_signal(signal.SIGINT)
    terminal.until("ending what was started", 10)
    assert terminal.process.wait(40) == 0
    assert [process for process in mine if process.is_running()] == []
    assert not folder.exists()


def test_a_port_that_is_in_use_is_named_with_its_holder_before_anything_starts() -> None:
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((ADDRESSES[2], 0))
        held.listen()
        port = held.getsockname()[1]
        result = subprocess.run(
            [
                sys.executable, "-m", "tidings.testing.cluster_demo", f"--bind-address={','.join(ADDRESSES)}",
                f"--c2s-ports={free_port(ADDRESSES[0])}", "--c2s-tls-ports=0", "--admin-port=0",
                f"--cluster-port={port}",
            ],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert result.returncode == 1
    assert f"port {port} of {ADDRESSES[2]} is in use by" in result.stderr
    assert f"process {os.getpid()}" in result.stderr
    assert "starting" not in result.stdout


def test_a_wrong_option_is_said_before_anything_starts() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tidings.testing.cluster_demo", "--virt-host=example.org"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.returncode, "did you mean --virt-hosts?" in result.stderr) == (2, True)
    assert "starting" not in result.stdout
