"""What becomes of a connection: proof, or none."""

from __future__ import annotations

import socket

import pytest

from tidings.kit.probe import Outcome, probe
from tidings.testing.server import free_port


async def test_who_listens_accepts_and_where_nobody_does_it_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert await probe("127.0.0.1", listening.getsockname()[1]) is Outcome.ACCEPTED
    assert await probe("127.0.0.1", free_port("127.0.0.1")) is Outcome.REFUSED


@pytest.mark.parametrize(
    ("address", "port"),
    [("a..b", 5777), ("a" * 64 + ".test", 5777), ("127.0.0.1\0", 5777), ("127.0.0.1", 65537), ("127.0.0.1", 0)],
)
async def test_an_address_that_is_none_proves_nothing(address: str, port: int) -> None:
    assert await probe(address, port) is Outcome.SILENT
