"""What one router sends to another one, and what that one answers; see forward_links.py."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from services.router.message_queue import MESSAGE_BYTES
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import ForwardRequest, ForwardResponse
from tidings.cluster.flows import NOTES, Doubt
from tidings.cluster.forwarding import Forwarder, Item, Mode, Sent
from tidings.cluster.node import Node
from tidings.kit.link import INTERVAL, PATIENT, Outbox
from tidings.kit.logging import get_logger

log = get_logger("cluster")

# Seconds after which another router should have answered, and what it has taken should be safe.
SLOW = 0.15


class OutgoingLink:
    """What this router sends to another one."""

    def __init__(self, node: Node, forwarder: Forwarder) -> None:
        self.node = node
        self._forwarder = forwarder
        self.outbox: Outbox[ForwardRequest] = Outbox(ForwardRequest, INTERVAL, resumable=True, most=PATIENT)
        self.outbox.on_batch = self._numbered
        self.outbox.on_relief = self._relieved
        # The other router has answered a call; and it has answered the last one, and that has not ended.
        self.welcomed = False
        self.up = False
        # Notes of the strategy that found no room: they must not be lost.
        self._postponed: deque[tuple[Item, Sent]] = deque()
        # What is in no numbered batch yet; then by batch, and when that was sent; and what is being dealt with for
        # longer, and whether the other router may have stood still before it said so.
        self._unnumbered: deque[Sent] = deque()
        self._batches: dict[int, list[Sent | None]] = {}
        self._sent_at: dict[int, float] = {}
        self._later: dict[tuple[int, int], tuple[Sent, bool]] = {}
        # By batch and place in it, what was taken and is not known to be safe; and the bytes of all that somebody
        # waits for.
        self._unsafe: dict[int, dict[int, Sent]] = {}
        self._unsafe_since: dict[int, float] = {}
        self.unsafe_bytes = 0
        # Keeps it up.
        self.task: asyncio.Task[Any] | None = None

    def send(self, item: Item, sent: Sent, refusals_seen: int) -> None:
        """Raises Overflow when the other router has not taken anything for long."""
        if item.mode is Mode.STRATEGY and (self._postponed or self.outbox.congested):
            self._postponed.append((item, sent))
            return
        if item.mode in NOTES:
            self._note(item, sent)
            return
        source: Envelope = item.payload
        envelopes = self.outbox.begin(len(source.stanza) + 128)
        envelopes.append(source)
        envelope = envelopes[-1]
        envelope.forwarding = int(item.mode)
        envelope.refusals_seen = refusals_seen
        envelope.view_version = self._forwarder.view.version
        envelope.hops = source.hops + 1
        if sent.group is not None:
            envelope.prompt = not sent.group.certain
        if not envelope.to_jid or (sent.group is not None and not item.resource):
            # Sent without `to`, which means the account (RFC 6120 10.3); or to a full JID that is gone, and treated
            # as if to the account (RFC 6121 8.5.3.2.1).
            envelope.to_jid = f"{item.account}/{item.resource}" if item.resource else item.account
        if sent.waiter is not None:
            sent.waiter.expect()
            sent.size = len(source.stanza) + MESSAGE_BYTES
            self.unsafe_bytes += sent.size
        self._unnumbered.append(sent)

    def _note(self, item: Item, sent: Sent) -> None:
        name, content = item.payload
        self.outbox.begin(len(content)).add(
            forwarding=int(item.mode), to_jid=item.account, children=(name,), stanza=content, prompt=True
        )
        self._unnumbered.append(sent)

    def _relieved(self) -> None:
        while self._postponed and not self.outbox.congested:
            self._note(*self._postponed.popleft())
        self._forwarder.relieved()

    def _numbered(self, batch: ForwardRequest) -> None:
        self._batches[batch.sequence] = [self._unnumbered.popleft() for _ in batch.envelopes]
        self._sent_at[batch.sequence] = time.monotonic()

    def receive(self, response: ForwardResponse) -> None:
        """Takes the answers. Raises Gap."""
        self.outbox.confirmed(response.received_through)
        if response.sequence and not self.outbox.take(response.sequence):
            return
        for answer in response.answers:
            if answer.safe:
                continue
            key = (answer.sequence, answer.index)
            batch = self._batches.get(answer.sequence)
            sent, late = self._later.pop(key, (None, False))
            if sent is None and batch is not None:
                sent, batch[answer.index] = batch[answer.index], None
                late = self._is_late(answer.sequence)
            if sent is None:
                continue
            if answer.later:
                self._later[key] = sent, late
            elif answer.refused:
                log.debug("refused", by=self.node.hostname, to=sent.item.account, view=answer.view_version)
                self._forwarder.refused(sent, answer.view_version)
                self._settle(sent)
            else:
                self._taken(key, sent, late, answer.content)
        for sequence in [number for number in self._batches if number <= response.safe_through]:
            late = self._is_late(sequence)
            del self._sent_at[sequence]
            for index, taken in enumerate(self._batches.pop(sequence)):
                if taken is not None:
                    self._taken((sequence, index), taken, late)
        for answer in response.answers:
            if answer.safe and (sent := self._unsafe.get(answer.sequence, {}).pop(answer.index, None)) is not None:
                self._settle(sent)
        for sequence in response.safe:
            self._unsafe_since.pop(sequence, None)
            for sent in self._unsafe.pop(sequence, {}).values():
                self._settle(sent)
        if response.answers:
            self.outbox.confirm_soon()

    def _is_late(self, sequence: int) -> bool:
        """Whether the other router has left a batch unanswered for so long that it may have stood still."""
        return self._sent_at.get(sequence, math.inf) < time.monotonic() - SLOW

    def _taken(self, place: tuple[int, int], sent: Sent, late: bool, content: bytes = b"") -> None:
        if sent.waiter is not None and sent.item.payload.answers:
            self._settle(sent)  # nothing is written for an error: it is where the session is
        elif sent.waiter is not None:
            self._unsafe.setdefault(place[0], {})[place[1]] = sent
            if late:
                # The session that it gives this to may be another router's by now.
                self._unsafe_since[place[0]] = 0.0
                self._forwarder.doubt_too(sent.item.flow, Doubt(sent.node, silent=True))
            elif place[0] not in self._unsafe_since:
                self._unsafe_since[place[0]] = time.monotonic()
        self._forwarder.taken(sent, content)

    def is_silent(self, moment: float) -> bool:
        """Whether what was sent before a moment of the monotonic clock is not answered."""
        return next(iter(self._sent_at.values()), moment) < moment

    def unsafe_since(self, moment: float) -> Iterator[tuple[str, ...]]:
        """The flows of what was taken before a moment of the monotonic clock, or late, and is not known as safe."""
        for sequence, since in self._unsafe_since.items():
            if since <= moment:
                yield from (sent.item.flow for sent in self._unsafe[sequence].values())

    def _settle(self, sent: Sent) -> None:
        if sent.waiter is not None:
            self.unsafe_bytes -= sent.size
            sent.waiter.settle()

    def lost(self) -> None:
        """The other router is no more: everything unanswered comes back, and what it has not said to be safe."""
        self.outbox.on_batch = None
        if self.task is not None:
            self.task.cancel()
        unanswered = [sent for batch in self._batches.values() for sent in batch if sent is not None]
        unanswered += [
            *(sent for sent, _ in self._later.values()),
            *self._unnumbered,
            *(sent for _, sent in self._postponed),
        ]
        self._batches.clear()
        self._sent_at.clear()
        self._later.clear()
        self._unnumbered.clear()
        self._postponed.clear()
        unsafe = [sent for batch in self._unsafe.values() for sent in batch.values()]
        self._unsafe.clear()
        self._unsafe_since.clear()
        self._forwarder.again(unsafe)
        for sent in unsafe:
            self._settle(sent)
        for sent in unanswered:
            self._forwarder.lost(sent)
            self._settle(sent)
