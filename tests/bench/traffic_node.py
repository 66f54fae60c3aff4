"""A node that counts what goes between it and others: `python tests/bench/traffic_node.py run …` is `tidings run …`.

Every link has one client; there both directions are counted, around the functions that serialise what is sent and
parse what comes. Bytes are those of gRPC messages, without HTTP/2 and TLS. Calls within the process are none.

The counts so far are written to the file that TRAFFIC_FILE names, as JSON, at the start and on every SIGUSR1.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tidings.api.common.v1.stanza_pb2 import Envelope, Forwarding
from tidings.api.router.v1.router_pb2 import AttachRequest, AttachResponse, ForwardRequest, ForwardResponse
from tidings.cli import main
from tidings.kit import channel

# What is counted apart. On the links between routers: copies of stanzas, those of them that were sent before, notes
# of strategies and modules, and all else (acknowledgements, answers, numbers of batches).
STANZAS, AGAIN, NOTES, ACKS = "stanzas", "again", "notes", "acks"
# On the links of connectors to routers of other nodes: stanzas, and all else (events and commands for streams).
CONNECTORS, STREAMS = "connectors", "streams"
# Hand-over and end of sessions.
SESSIONS = "sessions"
# What goes on without stanzas and sessions: registries, health; links of components to routers, and the rest.
MEMBERSHIP, COMPONENTS = "membership", "components"
CAUSED = (STANZAS, AGAIN, NOTES, ACKS, CONNECTORS, STREAMS, SESSIONS)
KINDS = (*CAUSED, MEMBERSHIP, COMPONENTS)

CALLS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
MEMBERSHIP_SERVICES = ("tidings.api.registry.v1.", "tidings.api.node.v1.", "grpc.health.v1.")
SESSION_CALLS = ("AdoptSession", "EndSession")


def kind_of_call(method: str) -> str:
    """The kind of a call that is no link. `method`: `/package.Service/Method`."""
    if method.startswith(MEMBERSHIP_SERVICES, 1):
        return MEMBERSHIP
    return SESSIONS if method.rpartition("/")[2] in SESSION_CALLS else COMPONENTS


def field_size(size: int) -> int:
    """The bytes of a message of `size` bytes as a field (with a number under 16) of another one."""
    return 1 + max(1, (size.bit_length() + 6) // 7) + size


class Traffic:
    """The counts of one process."""

    def __init__(self) -> None:
        # By kind: gRPC messages; envelopes, events, commands or answers in them; bytes.
        self.counts: dict[str, list[int]] = {kind: [0, 0, 0] for kind in KINDS}
        # Stanzas that have been sent to somebody who decides: by (session, number, account).
        self.decided: set[tuple[str, int, str]] = set()
        self._writes = 0

    def add(self, kind: str, messages: int = 0, items: int = 0, size: int = 0) -> None:
        counts = self.counts[kind]
        counts[0] += messages
        counts[1] += items
        counts[2] += size

    def write(self, path: Path) -> None:
        self._writes += 1
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"writes": self._writes, "counts": self.counts}))
        new.rename(path)


class CountingChannel:
    """A channel to one start of a node, whose calls are counted."""

    def __init__(self, counted: Any, traffic: Traffic) -> None:
        self._channel = counted
        self._traffic = traffic
        # The last batch that was sent on the link between the routers, and the stanzas for sessions there.
        self._sequence = 0
        self._copied: set[tuple[str, int, str]] = set()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._channel, name)
        if name not in CALLS:
            return attribute

        def counting(method: str, request_serializer: Any, response_deserializer: Any, **options: Any) -> Any:
            def serialize(request: Any) -> bytes:
                data: bytes = request_serializer(request)
                self.count(method, request, len(data))
                return data

            def parse(data: bytes) -> Any:
                response = response_deserializer(data)
                self.count(method, response, len(data))
                return response

            return attribute(method, request_serializer=serialize, response_deserializer=parse, **options)

        return counting

    def count(self, method: str, message: Any, size: int) -> None:
        """Counts a request or a response of `size` bytes."""
        if isinstance(message, ForwardRequest):
            self._forwarded(message, size)
        elif isinstance(message, ForwardResponse):
            self._traffic.add(ACKS, 1, len(message.answers), size)
        elif isinstance(message, AttachRequest):
            self._attached(message, len(message.events), size)
        elif isinstance(message, AttachResponse):
            self._attached(message, len(message.commands), size)
        else:
            self._traffic.add(kind_of_call(method), 1, 1, size)

    def _forwarded(self, request: ForwardRequest, size: int) -> None:
        """A message counts once, with the first kind that is in it; what is around its envelopes is no stanza's."""
        resent = 0 < request.sequence <= self._sequence
        self._sequence = max(self._sequence, request.sequence)
        found: dict[str, int] = defaultdict(int)
        for envelope in request.envelopes:
            kind = (
                NOTES
                if envelope.forwarding in (Forwarding.FORWARDING_NOTE, Forwarding.FORWARDING_STRATEGY)
                else STANZAS
            )
            if resent or (kind is STANZAS and self._sent_before(envelope)):
                kind = AGAIN
            bytes_ = field_size(envelope.ByteSize())
            self._traffic.add(kind, 0, 1, bytes_)
            found[kind] += 1
            size -= bytes_
        self._traffic.add(next((kind for kind in (STANZAS, AGAIN, NOTES) if kind in found), ACKS), 1)
        self._traffic.add(ACKS, 0, 0, size)

    def _sent_before(self, envelope: Envelope) -> bool:
        """Whether this stanza has been sent before: to this router, or to any one that decides."""
        if not envelope.number:
            return False
        known = self._traffic.decided if envelope.forwarding == Forwarding.FORWARDING_DECIDE else self._copied
        key = (envelope.origin, envelope.number, envelope.to_jid.partition("/")[0])
        before = key in known
        known.add(key)
        return before

    def _attached(self, message: AttachRequest | AttachResponse, items: int, size: int) -> None:
        bytes_ = sum(field_size(envelope.ByteSize()) for envelope in message.envelopes)
        self._traffic.add(CONNECTORS, 0, len(message.envelopes), bytes_)
        self._traffic.add(STREAMS, 0, items)
        # What is around the envelopes is small, but where there are events too.
        self._traffic.add(CONNECTORS if message.envelopes else STREAMS, 1)
        self._traffic.add(STREAMS if items or not message.envelopes else CONNECTORS, 0, 0, size - bytes_)


if __name__ == "__main__":
    traffic, file = Traffic(), Path(os.environ["TRAFFIC_FILE"])
    channel.intercept = lambda made: CountingChannel(made, traffic)
    signal.signal(signal.SIGUSR1, lambda _number, _frame: traffic.write(file))
    traffic.write(file)
    sys.exit(main())
