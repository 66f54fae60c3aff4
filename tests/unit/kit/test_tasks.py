"""No task dies unseen."""

from __future__ import annotations

import asyncio
import json

import pytest

from tidings.kit.logging import configure
from tidings.kit.tasks import Tasks, is_cancelled


def told(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    return [(line["event"], line["task"]) for line in lines]


async def nothing() -> None:
    pass


async def test_a_task_that_ends_because_what_it_waits_for_was_cancelled_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """grpc.aio raises CancelledError in whoever waits for a call whose channel is closed."""
    configure("json")
    waited_for = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        try:
            await waited_for
        except asyncio.CancelledError:
            assert not is_cancelled()
            raise

    owner = Tasks()
    task = owner.spawn(wait(), "waits")
    await asyncio.sleep(0)
    waited_for.cancel()
    await asyncio.wait([task])
    assert told(capsys) == [("task_cancelled", "waits")]


async def test_a_task_that_its_owner_stops_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    cancelled: list[bool] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(is_cancelled())
            raise

    owner = Tasks()
    owner.spawn(wait(), "waits")
    owner.spawn(nothing(), "ends")
    await asyncio.sleep(0)
    await owner.stop()
    assert cancelled == [True]
    assert told(capsys) == []


async def test_a_task_that_raises_is_told_to_who_made_its_owner(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    dead: list[str] = []

    async def fail() -> None:
        raise KeyError("x")

    task = Tasks(lambda name, _error: dead.append(name)).spawn(fail(), "fails")
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert dead == ["fails"]
    assert told(capsys) == [("task_died", "fails")]
