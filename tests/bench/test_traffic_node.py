"""What the traffic benchmark counts is what is sent."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.bench.traffic_node import AGAIN, CONNECTORS, MEMBERSHIP, NOTES, STANZAS, CountingChannel, Traffic
from tidings.api.common.v1.stanza_pb2 import Envelope, Forwarding
from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.api.router.v1.router_pb2 import (
    AttachRequest,
    ForwardAnswer,
    ForwardRequest,
    ForwardResponse,
    StreamEvent,
)
from tidings.kit import channel
from tidings.testing.server import Installation

FORWARD = "/tidings.api.router.v1.RouterService/Forward"
ATTACH = "/tidings.api.router.v1.RouterService/Attach"


def stanza(number: int, forwarding: Forwarding = Forwarding.FORWARDING_DECIDE, size: int = 300) -> Envelope:
    return Envelope(
        origin="s1", number=number, forwarding=forwarding, to_jid="juliet@example.net/b", stanza=b"x" * size
    )


def count(counting: CountingChannel, method: str, *messages: Any) -> int:
    """The bytes of messages that are counted."""
    sizes = [message.ByteSize() for message in messages]
    for message, size in zip(messages, sizes, strict=True):
        counting.count(method, message, size)
    return sum(sizes)


def test_every_byte_on_a_link_is_counted_once() -> None:
    traffic = Traffic()
    counting = CountingChannel(None, traffic)
    note = Envelope(forwarding=Forwarding.FORWARDING_STRATEGY, stanza=b"+a@b/c")
    size = count(
        counting, FORWARD,
        ForwardRequest(sequence=1, received_through=900, envelopes=[stanza(1), note, stanza(2, size=20_000)]),
        ForwardRequest(sequence=2, envelopes=[note]),
        ForwardRequest(sequence=3, received_through=901),
        ForwardResponse(sequence=901, safe_through=3, answers=[ForwardAnswer(sequence=1, refused=True)]),
    )  # fmt: skip
    size += count(
        counting, ATTACH,
        AttachRequest(sequence=1, envelopes=[stanza(7), stanza(8, size=0)]),
        AttachRequest(sequence=2, envelopes=[stanza(9)], events=[StreamEvent(stream=1)]),
    )  # fmt: skip
    assert sum(bytes_ for _, _, bytes_ in traffic.counts.values()) == size
    assert sum(messages for messages, _, _ in traffic.counts.values()) == 6
    assert [traffic.counts[kind][:2] for kind in (STANZAS, NOTES, CONNECTORS)] == [[1, 2], [1, 2], [2, 3]]


def test_what_is_sent_again_is_counted_apart() -> None:
    traffic = Traffic()
    one, other = CountingChannel(None, traffic), CountingChannel(None, traffic)
    count(one, FORWARD, ForwardRequest(sequence=1, envelopes=[stanza(1)]))
    count(one, FORWARD, ForwardRequest(sequence=1, envelopes=[stanza(1)]))  # the call ended before it was confirmed
    count(other, FORWARD, ForwardRequest(sequence=1, envelopes=[stanza(1)]))  # it was refused, or its receiver died
    sessions = Forwarding.FORWARDING_SESSIONS
    count(one, FORWARD, ForwardRequest(sequence=2, envelopes=[stanza(2, sessions)]))
    count(other, FORWARD, ForwardRequest(sequence=2, envelopes=[stanza(2, sessions)]))  # a copy for each node
    assert traffic.counts[STANZAS][1] == 3
    assert traffic.counts[AGAIN][1] == 2


async def test_calls_on_a_real_link_are_counted_in_both_directions(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic = Traffic()
    monkeypatch.setattr(channel, "intercept", lambda made: CountingChannel(made, traffic))
    dialled = installation.dial(installation.registry_address)
    assert not isinstance(dialled, grpc.aio.Channel)
    stub: Any = RegistryServiceStub(dialled)
    request = ListNodesRequest()
    response = await stub.ListNodes(request, timeout=5)
    assert traffic.counts[MEMBERSHIP] == [2, 2, request.ByteSize() + response.ByteSize()]
    await dialled.close()
