"""What a link to another router tells the forwarding (services/router/forward_outgoing.py)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from services.router import forward_outgoing
from services.router.forward_outgoing import SLOW, OutgoingLink
from tests.unit.cluster.test_forwarding import Fixed, Waits
from tests.unit.router.memory_router import until
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import ForwardResponse
from tidings.cluster.forwarding import Forwarder, Item, Pending, Sent
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import Plan
from tidings.cluster.view import ClusterView
from tidings.kit.module import MESSAGE

NODES = [Node(name, name, "127.0.0.1", 5777, ("router",), NodeState.UP) for name in ("a", "b")]
ROMEO, JULIET = "romeo@example.org", "juliet@example.org"


class Links:
    """A router's port with a real link to "a"; notes what goes to "b"."""

    def __init__(self) -> None:
        self.strategy = Fixed(Plan(decides="a"))
        self.forwarder = Forwarder(self.strategy, self)  # type: ignore[arg-type]
        self.forwarder.view_changed(ClusterView(1, NODES))
        self.a = OutgoingLink(NODES[0], self.forwarder)
        self.to_b: list[str] = []

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        if node == "a":
            self.a.send(item, sent, refusals_seen)
        else:
            self.to_b.append(item.payload.id)

    def crowded(self, plan: Plan) -> bool:
        return False

    def decide(self, item: Item, plan: Plan) -> Pending:
        raise AssertionError("others decide")

    def run(self, id_: str) -> None:
        envelope = Envelope(kind=MESSAGE, id=id_, from_jid=f"{ROMEO}/r", number=int(id_), stanza=b"<message/>")
        self.forwarder.run(Item((ROMEO, JULIET), JULIET, "", envelope, waiter=Waits()))


@pytest.mark.parametrize("stood_still", [False, True])
async def test_nothing_goes_elsewhere_past_what_a_router_takes_late_until_that_is_safe(
    stood_still: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may give it to a session that another router has taken over while it stood still; then it is stored, and
    given by that one, behind whatever has come there before."""
    now = 100.0
    monkeypatch.setattr(forward_outgoing, "time", SimpleNamespace(monotonic=lambda: now))
    links = Links()
    written: list[Any] = []

    async def write(batch: Any) -> None:
        written.append(batch)

    running: asyncio.Task[None] = asyncio.ensure_future(links.a.outbox.run(write))
    links.run("1")
    await until(lambda: len(written) == 1)
    links.strategy.plan = Plan(decides="b")
    now += 10 * SLOW if stood_still else SLOW / 10
    links.run("2")
    assert links.to_b == [], "the first one is under way to where it was"
    links.a.receive(ForwardResponse(received_through=1, safe_through=1))
    assert links.to_b == ([] if stood_still else ["2"])
    # The next look, at what was taken and is not safe for long.
    assert list(links.a.unsafe_since(now - SLOW)) == ([(ROMEO, JULIET)] if stood_still else [])
    links.a.receive(ForwardResponse(safe=[1]))
    links.forwarder.doubt({})
    assert links.to_b == ["2"]
    running.cancel()


async def test_an_error_that_another_router_has_taken_is_safe_for_nothing_is_written_for_it() -> None:
    links = Links()
    waiter = Waits()
    written: list[Any] = []

    async def write(batch: Any) -> None:
        written.append(batch)

    running: asyncio.Task[None] = asyncio.ensure_future(links.a.outbox.run(write))
    error = Envelope(kind=MESSAGE, type="error", id="1", to_jid=ROMEO, answers=7, stanza=b"<message/>")
    links.forwarder.run(Item((JULIET, ROMEO), ROMEO, "", error, waiter=waiter))
    await until(lambda: len(written) == 1)
    assert waiter.things == 2
    links.a.receive(ForwardResponse(received_through=1, safe_through=1))
    assert waiter.things == 0
    running.cancel()
