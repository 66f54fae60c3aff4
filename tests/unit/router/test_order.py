"""What one account sends to another comes in order, also when some of it is still being written at another router
(RFC 6120 10.1)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.router.nodes import HOST, Client, running, soon
from tests.unit.router.unsure_database import at_once


async def test_what_comes_behind_what_another_router_has_given_to_a_session_that_has_ended_waits_for_that(
    tmp_path: Path,
) -> None:
    """That one stores it, for whoever comes next."""
    async with running(tmp_path, "a", "b", strategy="online-users") as nodes:
        await nodes.up("a", "b")
        romeo, juliet = await nodes.client("romeo", at="a"), await nodes.client("juliet", at="b")
        romeo.say(f"juliet@{HOST}/r", 0)
        await soon(lambda: juliet.numbers() == [0], "what a knows to be for b")
        may_write = asyncio.Event()

        async def wait() -> None:
            nodes.databases["b"].before = at_once
            await may_write.wait()

        nodes.databases["b"].before = wait
        romeo.say(f"juliet@{HOST}/r", 1)
        await soon(lambda: juliet.numbers() == [0, 1], "what b has taken")
        asked = nodes.looks_for_unsafe("a")
        juliet.disconnect()
        await soon(lambda: nodes.session("b", "juliet") is None, "it is seen that she has gone")
        romeo.say(f"juliet@{HOST}/r", 2)
        await soon(lambda: len(asked) > 1, "a waits for b")
        may_write.set()
        await nodes.waiting("juliet", 3)  # she has confirmed nothing
        again = Client(nodes, "juliet")
        await again.log_in()
        await soon(lambda: again.numbers() == [0, 1, 2], "in order")
