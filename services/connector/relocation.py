"""A client stream on its way from one router to another: because its session is handed over, because another router
keeps its account, or because the router that had the session is gone: another one carries it on from the copy here.

What the client sends meanwhile waits, and so does the end of the stream: it is told to the router that gets it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from services.connector.session_copy import SessionCopy
from tidings.kit.link import Overflow
from tidings.kit.logging import get_logger

if TYPE_CHECKING:
    from services.connector.client_stream import ClientStream
    from services.connector.router_link import RouterLink
    from tidings.api.router.v1.router_pb2 import Moved, SessionAttached

log = get_logger("connector")

# Seconds for a router that a stream is sent on to, to answer.
ANSWER_TIMEOUT = 1.0

UNREACHED = "the router that serves this stream is out of reach"
NOBODY = "no other router is in reach; please connect again"


class Relocation:
    """One stream's; from the moment that what it sends has to wait until it is settled which router gets it."""

    __slots__ = ("_moves", "_stream", "drains", "left", "reattaching", "waiting")

    def __init__(self, stream: ClientStream) -> None:
        self._stream = stream
        # What the client has sent meanwhile; how the stream has ended (clean, and the reason); and where the client
        # is to go since this connector drains.
        self.waiting: list[bytes] = []
        self.left: tuple[bool, str] | None = None
        self.drains: str | None = None
        # Its router is gone. And how often it was sent on to others since.
        self.reattaching = False
        self._moves = 0

    # --- to a router that another one has named ---

    def moved(self, moved: Moved) -> None:
        """The stream goes on at another router, or at the same one when the move did not come about."""
        if not moved.ticket:
            self._go_on()
            return
        # What it sent to the old one has been taken there; nothing more goes that way.
        self._stream.link = None
        self._stream.streams.spawn(self._move(moved), f"stream {self._stream.number} goes to another router")

    async def _move(self, moved: Moved) -> None:
        stream = self._stream
        if not stream.session:
            await self._send_on(moved)
            return
        stream.link = link = await stream.streams.link_to(moved.router_incarnation)
        if self.reattaching:
            if link is None:
                self.refused(UNREACHED)
            else:
                self._bring(link)
            return
        if link is None:
            stream.close("system-shutdown", UNREACHED)
        else:
            attach = link.event(stream.number).attach
            attach.ticket, attach.left = moved.ticket, self.left is not None
            # All that was sent is passed; the copy begins anew with what the router says.
            stream.copy = None if link.local else SessionCopy(link.node.incarnation)
        self._go_on()

    # --- before there is a session ---

    async def _send_on(self, moved: Moved) -> None:
        stream = self._stream
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT):
                stream.link = await stream.streams.link_to(moved.router_incarnation)
        if stream.link is None:
            # Any other will do as well.
            await self.open_elsewhere(moved.router_incarnation, moved.ticket)
            return
        if not stream.ended:
            stream.tell_opened(moved.ticket)
            stream.sent_on = SentOn(stream, moved.ticket)
        self._go_on()

    async def open_elsewhere(self, router: str, ticket: bytes) -> None:
        """A stream that is authenticated goes to any router but that one."""
        stream = self._stream
        stream.link = await stream.streams.other_link(router)
        if stream.link is None:
            stream.close("system-shutdown", NOBODY)
        elif not stream.ended:
            stream.tell_opened(ticket)
        self._go_on()

    # --- the router is gone ---

    def lost(self, router: str) -> None:
        """The router is gone: another one carries the session on from the copy."""
        self._begin()
        self._stream.streams.spawn(self._reattach(router), f"stream {self._stream.number} goes to another router")

    def surrender(self, link: RouterLink) -> None:
        """The router does not answer: this one takes the session over."""
        self._begin()
        if self._stream.link is not None:
            # When it wakes it must not go on with the session.
            self._stream.link.event(0).surrendered.session = self._stream.session
        self._stream.link = link
        self._bring(link)

    def _begin(self) -> None:
        if not self.reattaching:
            self.reattaching, self._moves = True, 0

    async def _reattach(self, router: str) -> None:
        stream = self._stream
        stream.link = link = await stream.streams.other_link(router)
        if link is None:
            self.refused(NOBODY)
        else:
            self._bring(link)

    def _bring(self, link: RouterLink) -> None:
        copy = self._stream.copy
        if copy is not None:
            try:
                copy.bring(link, self._stream.number, self._moves, self.left is not None)
            except Overflow:
                self.refused(UNREACHED)
            self._moves += 1

    def attached(self, attached: SessionAttached) -> None:
        """The router has taken the session over from the copy."""
        stream, copy, link = self._stream, self._stream.copy, self._stream.link
        if not self.reattaching or copy is None or link is None:
            return
        self.reattaching = False
        copy.attached(attached.ticket, link.node.incarnation)
        if link.local:
            stream.copy = None
        log.info("session_reattached", jid=stream.jid, router=link.node.hostname)
        self._go_on()

    def refused(self, why: str) -> None:
        """No router carries the session on: nobody needs to be told of the stream's end."""
        stream = self._stream
        stream.relocation = stream.link = stream.copy = None
        if self.left is not None:
            stream.tell_end(*self.left)
        else:
            stream.close("system-shutdown", why)

    # --- it is settled ---

    def _go_on(self) -> None:
        """The router that serves the stream now gets all that has waited."""
        stream = self._stream
        stream.relocation = None
        stream.set_reading()
        for data in self.waiting:
            stream.received(data)
        if self.left is not None:
            stream.tell_end(*self.left)
        elif self.drains is not None:
            stream.drain(self.drains)


class SentOn:
    """A stream that is authenticated and not bound, while the router that it was sent on to has said nothing: when
    that one does not answer in time, or is gone, another one is told of the stream."""

    __slots__ = ("_stream", "_ticket", "_timer")

    def __init__(self, stream: ClientStream, ticket: bytes) -> None:
        self._stream = stream
        self._ticket = ticket
        self._timer = asyncio.get_running_loop().call_later(ANSWER_TIMEOUT, self._silent)

    def answered(self) -> None:
        self._timer.cancel()
        self._stream.sent_on = None

    def _silent(self) -> None:
        link = self._stream.link
        if link is not None:
            # When it wakes it need not answer any more; what it still says is not for the stream, which may be sent
            # on to it once more.
            link.event(self._stream.number).closed.reason = "the stream went elsewhere"
            self._stream.streams.number_anew(self._stream)
            self.lost(link.node.incarnation)

    def lost(self, router: str) -> None:
        self.answered()
        stream = self._stream
        what = stream.relocate().open_elsewhere(router, self._ticket)
        stream.streams.spawn(what, f"stream {stream.number} goes to another router")
