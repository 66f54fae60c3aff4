"""Work of many callers done together: a commit costs the same for one row or a hundred."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# What is done at one time: nobody is to wait for long behind others.
MOST = 100


class Grouping(Generic[T, R]):
    """Hands items to `work` in groups: while one group is under way, those that come wait, and are the next one.

    `work` returns a result for each item, in their order. An error of it is everybody's in the group. Who waits is
    bounded by the callers.
    """

    def __init__(self, work: Callable[[Sequence[T]], Awaitable[Sequence[R]]]) -> None:
        self._work = work
        self._turn = asyncio.Lock()
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()

    async def do(self, item: T) -> R:
        """The result for an item. Raises what `work` raises."""
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        async with self._turn:
            # Whoever comes first does it for those who have come till then; they find it done.
            if not done.done():
                await self._next_group()
        return await done

    async def _next_group(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        try:
            results = await self._work([item for item, _ in group])
        except asyncio.CancelledError:
            # It is only this caller who does not wait any longer; what the others want is done by the next one.
            self._waiting.extendleft(reversed(group))
            raise
        except Exception as error:
            for _, done in group:
                if not done.done():
                    done.set_exception(error)
                    done.exception()  # who has ceased to wait does not miss it
        else:
            for (_, done), result in zip(group, results, strict=True):
                if not done.done():
                    done.set_result(result)
