"""Owners of background tasks: no task without one, and none dies unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tidings.kit.logging import get_logger

log = get_logger("server")


def is_cancelled() -> bool:
    """Whether the present task is cancelled, and not only what it waits for: a call ends so, without a word, when its
    channel is closed."""
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())


class Tasks:
    """Owns background tasks.

    `on_death` is called with the task's name and the exception of a task that ended by one: whoever made
    this owner decides what that means (the runner ends the process; a link ends the link). Tasks may end by
    returning.
    """

    def __init__(self, on_death: Callable[[str, BaseException], None] | None = None) -> None:
        self._on_death = on_death
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts `work` as a task that this owner cancels when it stops."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if not task.cancelling():
                # Nobody has cancelled it, but something that it waited for: a call, by the end of its channel.
                log.error("task_cancelled", task=task.get_name())
            return
        error = task.exception()
        if error is not None:
            log.error("task_died", task=task.get_name(), exc_info=error)
            if self._on_death is not None:
                self._on_death(task.get_name(), error)

    async def finish(self, timeout: float) -> None:
        """Lets the tasks end by themselves for `timeout` seconds, then cancels what is left."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout)
        await self.stop()

    async def stop(self) -> None:
        """Cancels all tasks and waits for their ends; what they raise meanwhile has been logged."""
        while self._tasks:
            tasks = [task for task in self._tasks if task is not asyncio.current_task()]
            if not tasks:
                return
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
