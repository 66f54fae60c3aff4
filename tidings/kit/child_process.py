"""One process that the supervisor has started: its start, what it says, its end with the supervisor's."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tidings.kit import notify
from tidings.kit.options import ENVIRONMENT

if TYPE_CHECKING:
    from tidings.kit.supervisor import ChildSpec

# The process that must not be outlived.
PARENT = "SUPERVISOR_PID"

# prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class ChildProcess:
    """Satisfies `tidings.kit.supervisor.Child`."""

    def __init__(self, process: asyncio.subprocess.Process, notices: socket.socket) -> None:
        """`notices`: where the process says that it serves."""
        self._process = process
        self._notices = notices

    async def serves(self) -> bool:
        loop = asyncio.get_running_loop()
        saying = loop.create_task(self._ready(), name="a process says that it serves")
        ending = loop.create_task(self._process.wait(), name="a process ends")
        try:
            await asyncio.wait((saying, ending), return_when=asyncio.FIRST_COMPLETED)
            return saying.done()
        finally:
            for task in (saying, ending):
                task.cancel()
            await asyncio.gather(saying, ending, return_exceptions=True)
            self._notices.close()

    async def _ready(self) -> None:
        loop = asyncio.get_running_loop()
        while notify.READY not in (await loop.sock_recv(self._notices, 4096)).splitlines():
            pass

    async def ended(self) -> int:
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            pass


async def spawn(spec: ChildSpec) -> ChildProcess:
    """Starts a process that ends with this one. It is no member of the terminal's group: Ctrl-C is for us alone."""
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.setblocking(False)
    try:
        notices.bind("")  # the kernel chooses an abstract address
        environment = _environment(spec, notices.getsockname(), os.environ)
        process = await asyncio.create_subprocess_exec(
            *_command(spec), stdin=asyncio.subprocess.DEVNULL, env=environment, start_new_session=True
        )
    except BaseException:
        notices.close()
        raise
    return ChildProcess(process, notices)


def _command(spec: ChildSpec) -> list[str]:
    # -P: what lies in the present folder must not hide what is installed.
    return [sys.executable, "-P", "-m", "tidings", "run", *spec.services, *spec.options.arguments()]


def _environment(spec: ChildSpec, notices: bytes, inherited: Mapping[str, str]) -> dict[str, str]:
    """Secrets go this way: others on the machine see the command line. All that our own TIDINGS_ variables say is
    in the options."""
    kept = {name: value for name, value in inherited.items() if not name.startswith(ENVIRONMENT)}
    return {
        **kept,
        **spec.options.secrets(),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        notify.VARIABLE: "@" + notices[1:].decode(),
        PARENT: str(os.getpid()),
    }


def end_with_parent() -> bool:
    """Whether a supervisor has started this process; the kernel then kills it when the supervisor is gone."""
    parent = os.environ.pop(PARENT, "")
    if not parent:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, b"tidings", 0, 0, 0)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) or os.getppid() != int(parent):
        sys.exit(1)  # it was gone before this could be asked for
    return True
