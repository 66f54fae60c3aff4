"""What another router sends to this one, and the answers to it; see forward_links.py."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import ForwardRequest, ForwardResponse
from tidings.cluster.flows import NOTES
from tidings.cluster.forwarding import Forwarder, Item, Mode
from tidings.kit.link import INTERVAL, Outbox
from tidings.kit.logging import get_logger
from tidings.kit.module import MESSAGE

log = get_logger("cluster")

# Seconds after which messages that are safe are told of though others of their batch are not.
EARLY = 0.05


class _Batch:
    """A batch of another router with messages that somebody there waits for."""

    __slots__ = ("_early", "_left", "_link", "_sequence")

    def __init__(self, link: IncomingLink, sequence: int) -> None:
        self._link = link
        self._sequence = sequence
        # Messages that are not safe; and the batch itself, while it is being taken.
        self._left = 1
        # Those that are safe before others.
        self._early: list[int] = []

    def message(self, index: int) -> _Message:
        self._left += 1
        return _Message(self, index)

    def settle(self, index: int = -1) -> None:
        self._left -= 1
        if not self._left:
            self._link.outbox.begin_item().safe.append(self._sequence)
        elif index >= 0:
            if not self._early:
                # Mostly all of them are written together.
                asyncio.get_running_loop().call_later(EARLY, self._tell)
            self._early.append(index)

    def _tell(self) -> None:
        early, self._early = self._early, []
        if self._left:
            batch = self._link.outbox.begin_item()
            for index in early:
                batch.answers.add(sequence=self._sequence, index=index, safe=True)


class _Message:
    """One of its messages: a waiter (`tidings.cluster.flows.Waiter`)."""

    __slots__ = ("_batch", "_index", "_left")

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch = batch
        self._index = index
        # It is being dealt with.
        self._left = 1

    def expect(self) -> None:
        self._left += 1

    def settle(self) -> None:
        self._left -= 1
        if not self._left:
            self._batch.settle(self._index)


class IncomingLink:
    """What another router sends to this one."""

    def __init__(self, incarnation: str, forwarder: Forwarder) -> None:
        self.incarnation = incarnation
        self._forwarder = forwarder
        self.outbox: Outbox[ForwardResponse] = Outbox(ForwardResponse, INTERVAL, resumable=True, bounded=False)
        # The call that serves it now.
        self.handling: asyncio.Task[Any] | None = None

    def receive(self, request: ForwardRequest) -> None:
        """Takes a batch; what can be dealt with at once is, the rest is answered later. Raises Gap."""
        outbox = self.outbox
        outbox.confirmed(request.received_through)
        sequence = request.sequence
        if not sequence:
            return
        if outbox.take(sequence):
            batch = _Batch(self, sequence)
            for index, envelope in enumerate(request.envelopes):
                try:
                    self._take(sequence, index, envelope, batch)
                except Exception:
                    # It must not take those behind it along: of a batch that was taken none may be forgotten.
                    log.exception("forwarded_item_failed", router=self.incarnation, forwarding=envelope.forwarding)
                    outbox.begin_item().answers.add(sequence=sequence, index=index, refused=True)
            outbox.safe = sequence
            batch.settle()
        outbox.confirm_soon()

    def _take(self, sequence: int, index: int, envelope: Envelope, batch: _Batch) -> None:
        account, _, resource = envelope.to_jid.partition("/")
        mode = Mode(envelope.forwarding)
        item = Item(
            (envelope.from_jid.partition("/")[0], account), account, resource,
            (envelope.children[0], envelope.stanza) if mode in NOTES else envelope,
            mode, source=self.incarnation, guess=envelope.prompt,
            answer=partial(self._answered, sequence, index, envelope.prompt),
        )  # fmt: skip
        if envelope.kind == MESSAGE and envelope.number and mode not in NOTES:
            item.waiter = batch.message(index)
        self._forwarder.incoming(item, envelope.view_version, envelope.refusals_seen)
        if item.answer is not None:
            self.outbox.begin_item().answers.add(sequence=sequence, index=index, later=True)
            item.answer = partial(self._answered, sequence, index, True)

    def _answered(self, sequence: int, index: int, prompt: bool, item: Item) -> None:
        if item.taken and not prompt and not item.content:
            return
        answer = self.outbox.begin_item().answers.add(sequence=sequence, index=index)
        answer.content = item.content
        if not item.taken:
            answer.refused = True
            if item.mode is Mode.DECIDE:
                answer.view_version = self._forwarder.view.version
