"""What another router sends, taken from its link."""

from __future__ import annotations

import pytest

from services.router.forward_incoming import IncomingLink
from tests.unit.cluster.test_forwarding import Fixed, Port
from tidings.api.common.v1.stanza_pb2 import Envelope, Forwarding
from tidings.api.router.v1.router_pb2 import ForwardRequest
from tidings.cluster.forwarding import Forwarder, Item, Pending
from tidings.cluster.node import Node, NodeState
from tidings.cluster.strategy import HERE, Plan
from tidings.cluster.view import ClusterView
from tidings.kit.module import PRESENCE

ROMEO, JULIET = "romeo@example.org/orchard", "juliet@example.org"


class Device(Port):
    """A router with one session, which is not the one that the first stanza is for."""

    def decide(self, item: Item, plan: Plan) -> Pending:
        self.decided.append(item.payload.id)
        item.taken = item.payload.id != "for another device"
        return None


@pytest.mark.parametrize("prompt", [True, False])
async def test_behind_a_refused_copy_only_what_may_come_back_is_refused(prompt: bool) -> None:
    """`prompt` says of a copy that several routers were asked, and another one may have taken it: then it does not come
    back (common.v1 Envelope)."""
    port = Device()
    forwarder = Forwarder(Fixed(HERE), port)  # type: ignore[arg-type]
    forwarder.view_changed(ClusterView(1, [Node("a", "a", "127.0.0.1", 5777, ("router",), NodeState.UP)]))
    link = IncomingLink("a", forwarder)
    for sequence, id_ in enumerate(("for another device", "for all"), 1):
        envelope = Envelope(
            kind=PRESENCE, id=id_, from_jid=ROMEO, to_jid=JULIET,
            forwarding=Forwarding.FORWARDING_SESSIONS, prompt=prompt,
        )  # fmt: skip
        link.receive(ForwardRequest(sequence=sequence, envelopes=[envelope]))
    answers = {answer.sequence: answer.refused for answer in link.outbox.batch.answers}
    assert answers == {1: True, 2: not prompt}
    assert port.decided == (["for another device", "for all"] if prompt else ["for another device"])
