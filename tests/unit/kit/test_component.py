"""What a component sends by itself: through a router that lives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tidings.api.component.v1 import component_pb2 as pb
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.component import Component
from tidings.kit.link import MAX_BYTES, Outbox, Overflow
from tidings.kit.service import Context
from tidings.kit.tasks import Tasks

STANZA = b"<message from='weather.localhost' to='juliet@localhost'/>"
R1 = Node("r1", "i1", "127.0.0.11", 5777, ("router",), state=NodeState.UP)
R2 = replace(R1, hostname="r2", incarnation="i2", address="127.0.0.12")


def attached(*nodes: Node) -> Component:
    """A component with a link to each of these routers."""
    own = Node("w", "w1", "127.0.0.13", 5777, ("weather",))
    # All that a component looks at to send something.
    member: Any = SimpleNamespace(view=ClusterView(1, nodes))
    nothing: Any = None
    component = Component(
        Context(nothing, own, member, nothing, nothing, nothing, Tasks(), nothing),
        "weather",
        domains=["weather.{vhost}"],
    )
    component.links = {node.incarnation: Outbox(pb.AttachRequest, 0) for node in nodes}
    return component


def sent(component: Component) -> dict[str, int]:
    """How many stanzas wait in each link."""
    return {router: len(outbox.batch.envelopes) for router, outbox in component.links.items()}


@pytest.mark.parametrize("state", [NodeState.FAILED, NodeState.SUSPECT, NodeState.DRAINING])
def test_a_stanza_goes_through_a_router_that_is_up_where_there_is_one(state: NodeState) -> None:
    component = attached(replace(R1, state=state), R2)
    assert component.send(STANZA)
    assert sent(component) == {"i1": 0, "i2": 1}


def test_a_router_that_is_suspect_is_better_than_none_and_a_failed_one_is_none() -> None:
    suspect = attached(replace(R1, state=NodeState.SUSPECT))
    assert suspect.send(STANZA)
    assert sent(suspect) == {"i1": 1}
    failed = attached(replace(R1, state=NodeState.FAILED))
    assert not failed.send(STANZA)
    assert not attached().send(STANZA)


def test_a_router_that_takes_nothing_is_passed_over() -> None:
    component = attached(R1, R2)
    with pytest.raises(Overflow):
        while True:
            component.links["i1"].begin(MAX_BYTES)
    assert component.send(STANZA)
    assert sent(component)["i2"] == 1
