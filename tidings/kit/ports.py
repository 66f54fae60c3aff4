"""Ports that are taken, and by whom."""

from __future__ import annotations

import os
from pathlib import Path

_LISTEN = "0A"


class PortInUse(Exception):
    """A port that another process holds; the text says which, and what to do."""

    def __init__(self, address: str, port: int, holder: str | None, option: str = "") -> None:
        where = f"port {port}" + (f" of {address}" if address else "")
        who = f" by {holder}" if holder else ""
        hint = f", or choose another port with {option}" if option else ""
        super().__init__(f"{where} is in use{who}; stop that program{hint}")


def port_holder(port: int, address: str = "") -> str | None:
    """Who listens on a TCP port of this machine, as "name (process 123)"; None where that can't be seen."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) in inodes:
                    return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue  # gone, or somebody else's
    return None
