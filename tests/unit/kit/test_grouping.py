"""Work of many callers done together."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence

import pytest

from tidings.kit.grouping import MOST, Grouping


class Doubling:
    """Doubles numbers, when the gate is open; 0 breaks its group."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.groups: list[list[int]] = []
        self.grouping = Grouping(self._work)

    async def _work(self, items: Sequence[int]) -> list[int]:
        self.groups.append(list(items))
        await self.gate.wait()
        if 0 in items:
            raise ValueError("zero")
        return [2 * item for item in items]


async def test_who_comes_while_a_group_is_under_way_is_in_the_next_one() -> None:
    doubling = Doubling()
    tasks = [asyncio.ensure_future(doubling.grouping.do(number)) for number in range(1, MOST + 10)]
    await asyncio.sleep(0)
    assert len(doubling.groups) == 1
    doubling.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(1, MOST + 10)]
    assert sum(map(len, doubling.groups)) == MOST + 9
    assert max(map(len, doubling.groups)) <= MOST
    assert len(doubling.groups) <= 3


async def test_an_error_is_that_of_its_group_alone() -> None:
    doubling = Doubling()
    doubling.gate.set()
    results = await asyncio.gather(
        doubling.grouping.do(1), doubling.grouping.do(0), doubling.grouping.do(2), return_exceptions=True
    )
    assert any(isinstance(result, ValueError) for result in results)
    assert await doubling.grouping.do(3) == 6


async def test_who_waits_no_longer_takes_nobody_along() -> None:
    doubling = Doubling()
    first = asyncio.ensure_future(doubling.grouping.do(1))
    second = asyncio.ensure_future(doubling.grouping.do(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    doubling.gate.set()
    assert await second == 4


async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    doubling = Doubling()
    first, second, third = (asyncio.ensure_future(doubling.grouping.do(number)) for number in (1, 0, 2))
    await asyncio.sleep(0)
    third.cancel()
    doubling.gate.set()
    results = await asyncio.gather(first, second, third, return_exceptions=True)
    assert [type(result) for result in results] == [int, ValueError, asyncio.CancelledError]
    del first, second, third, results
    await asyncio.sleep(0)
    gc.collect()
    assert complaints == []
