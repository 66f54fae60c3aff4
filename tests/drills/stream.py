"""One connection, byte by byte: what has come whole is an element, what is cut off in its midst is nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from tidings.xmpp import ns


class Lost(Exception):
    """The connection is gone, or the stream was closed."""


class Stream(asyncio.Protocol):
    """Bytes to first-level elements, in both directions of one TCP connection."""

    def __init__(self, serves: bool = False) -> None:
        """`serves`: it is a server's end, which answers the peer's </stream:stream> itself."""
        self._serves = serves
        self._transport: asyncio.Transport | None = None
        self._elements: deque[Element] = deque()
        self._handler: Callable[[Element], None] | None = None
        self._on_lost: Callable[[], None] | None = None
        # Who waits for an element, or for the peer's header.
        self._waiter: asyncio.Future[None] | None = None
        self._open = False
        # How many more bytes may pass before the connection is cut; None: all.
        self._in_left: int | None = None
        self._out_left: int | None = None
        self._parser: Any = None
        self.lost = False
        self.footer = False
        # Why it ended, in words, where that was not a mere loss.
        self.error = ""
        self.restart()

    # --- life ---

    async def connect(self, host: str, port: int, timeout: float) -> None:
        """Raises OSError, TimeoutError."""
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(lambda: self, host, port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._lose()

    def abort(self) -> None:
        """Drops the connection; nothing that comes behind counts."""
        if self._transport is not None:
            self._transport.abort()
        self._lose()

    def desert(self) -> None:
        """Leaves the connection open and looks at it no more, as one that walked out of reach."""
        self.read(False)
        self._lose()

    def _lose(self) -> None:
        if self.lost:
            return
        self.lost = True
        self._wake()
        if self._on_lost is not None:
            self._on_lost()

    # --- cuts ---

    def cut_after(self, received: int | None = None, sent: int | None = None) -> None:
        """Lets so many more bytes pass, at most, in that direction, and then drops the connection."""
        self._in_left, self._out_left = received, sent

    def read(self, on: bool) -> None:
        """Whether it reads; the peer notices when the buffers between them are full."""
        if self._transport is not None and not self.lost:
            (self._transport.resume_reading if on else self._transport.pause_reading)()

    # --- out ---

    def write(self, data: str | bytes) -> bool:
        """Whether all of it was given to the connection."""
        if self.lost or self._transport is None or self._transport.is_closing():
            return False
        raw = data.encode() if isinstance(data, str) else data
        if self._out_left is not None:
            whole = len(raw) <= self._out_left
            raw = raw[: self._out_left]
            self._out_left -= len(raw)
            self._transport.write(raw)
            if not whole:
                # Closed, not aborted: these bytes are to arrive.
                self._transport.close()
                self._lose()
                return False
            return True
        self._transport.write(raw)
        return True

    # --- in ---

    def restart(self) -> None:
        """A new stream begins in both directions."""
        parser = expat.ParserCreate(namespace_separator="}")
        parser.buffer_text = True
        self._depth = 0
        self._open = False
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._data
        self._parser = parser

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._open = True
            self._wake()
            return
        if self._depth == 2:
            self._builder = TreeBuilder()
        self._builder.start(_tag(name), {_tag(key): value for key, value in attributes.items()})

    def _data(self, text: str) -> None:
        if self._depth > 1:
            self._builder.data(text)

    def _end(self, name: str) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.footer = True
            self._wake()
            return
        self._builder.end(_tag(name))
        if self._depth == 1 and not self.lost:
            self._take(self._builder.close())

    def data_received(self, data: bytes) -> None:
        if self.lost:
            return
        if self._in_left is not None:
            data = data[: self._in_left]
            self._in_left -= len(data)
        try:
            self._parser.Parse(data, False)
        except expat.ExpatError as error:
            self.error = f"not well-formed: {error}"
            self.abort()
        if self._in_left == 0 or (self.footer and not self._serves):
            self.abort()

    def _take(self, element: Element) -> None:
        if element.tag == f"{{{ns.STREAMS}}}error":
            self.error = element[0].tag.partition("}")[2] if len(element) else "error"
        if self._handler is not None:
            self._handler(element)
        else:
            self._elements.append(element)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, timeout: float) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(timeout):
            await self._waiter

    async def opened(self, timeout: float = 5.0) -> None:
        """Waits for the peer's header. Raises Lost, TimeoutError."""
        while not self._open:
            if self.lost:
                raise Lost(self.error)
            await self._wait(timeout)

    async def element(self, timeout: float = 5.0) -> Element:
        """The next element, one at a time. Raises Lost, TimeoutError."""
        while not self._elements:
            if self.lost:
                raise Lost(self.error)
            await self._wait(timeout)
        return self._elements.popleft()

    def go_live(self, handler: Callable[[Element], None], on_lost: Callable[[], None]) -> None:
        """From now on each element is handled when its last byte has come."""
        self._handler, self._on_lost = handler, on_lost
        while self._elements and self._handler is not None:
            handler(self._elements.popleft())
        if self.lost:
            on_lost()

    def leave(self) -> None:
        """Nobody handles what comes any longer."""
        self._handler = self._on_lost = None


def _tag(name: str) -> str:
    return f"{{{name}" if "}" in name else name
