"""Looks whether a process is there at all."""

from __future__ import annotations

import asyncio

# Seconds for a connection that is to prove that a node is dead.
PROBE_TIMEOUT = 0.5


async def refused(address: str, port: int) -> bool:
    """Whether a new connection is refused there: proof that no process listens. A time-out proves nothing."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            _, writer = await asyncio.open_connection(address, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
