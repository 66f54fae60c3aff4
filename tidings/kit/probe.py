"""Looks whether a process is there at all."""

from __future__ import annotations

import asyncio
from enum import Enum

from tidings.api.node.v1.node_pb2 import ProbeOutcome

# Seconds for a connection that is to prove something.
PROBE_TIMEOUT = 0.5


class Outcome(Enum):
    """What became of a new connection. The values are those of node.v1."""

    ACCEPTED = ProbeOutcome.PROBE_OUTCOME_ACCEPTED
    # Proof that no process listens.
    REFUSED = ProbeOutcome.PROBE_OUTCOME_REFUSED
    # Proves nothing.
    SILENT = ProbeOutcome.PROBE_OUTCOME_SILENT


async def probe(address: str, port: int) -> Outcome:
    """Connects, and drops the connection again."""
    if not 0 < port < 65536:
        return Outcome.SILENT  # uvloop would take another one
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError:
        return Outcome.REFUSED
    except (OSError, TimeoutError, ValueError):
        # ValueError: the address is no name (an empty label, or one of 64 characters; a NUL).
        return Outcome.SILENT
    writer.close()
    return Outcome.ACCEPTED


async def refused(address: str, port: int) -> bool:
    """Whether a new connection is refused there."""
    return await probe(address, port) is Outcome.REFUSED
