"""Fixtures that several files of the router's tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.router.test_connector_link import Attached
from tests.unit.router.test_copies import House
from tidings.kit.tasks import Tasks


@pytest.fixture
async def attached() -> AsyncIterator[Attached]:
    made = Attached()
    yield made
    await made.router.stop()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    tasks = Tasks()
    yield House(tasks)
    await tasks.stop()
