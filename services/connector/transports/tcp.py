"""TCP: client streams on plain ports (with STARTTLS, RFC 6120 5) and on TLS ports (XEP-0368).

One process-wide buffer receives for all connections: a buffer for each read costs more than the read, and
under TLS five times as much. Writes are joined and flushed once a tick: uvloop does not gather them itself.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from services.connector.client_stream import ClientStream

# One read at most. Larger ones only make other connections wait longer, and what is read of many at once has to be
# kept.
RECEIVE_BYTES = 4 * 1024
_received = memoryview(bytearray(RECEIVE_BYTES))

# Seconds for a TLS handshake: stops clients that never shake hands from holding memory. It may take as long as
# somebody thinks about trusting a certificate: clients ask in the midst of it.
HANDSHAKE_TIMEOUT = 60.0
# Seconds that a closed connection may take to send what is queued for it.
CLOSE_TIMEOUT = 5.0


# A client whose network is gone says nothing, not even goodbye: the kernel asks after KEEPALIVE_IDLE seconds of
# silence, so often, and gives up; what was sent and never confirmed ends the connection after USER_TIMEOUT.
KEEPALIVE_IDLE = 120
KEEPALIVE_INTERVAL = 20
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MS = 120_000


def _watch(connection: socket.socket | None) -> None:
    """Lets the kernel notice half-open connections, which would hold their sessions for ever (RFC 6120 4.6.1)."""
    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_MS),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Flusher:
    """Writes what the connections of this process have to send, once a tick."""

    __slots__ = ("_dirty", "_loop")

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dirty: list[TcpConnection] = []

    def soon(self, connection: TcpConnection) -> None:
        if not self._dirty:
            (self._loop or self._started()).call_soon(self._flush)
        self._dirty.append(connection)

    def _started(self) -> asyncio.AbstractEventLoop:
        self._loop = asyncio.get_running_loop()
        return self._loop

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()


class TcpConnection(asyncio.BufferedProtocol):
    """One connection. All that is decided about it is decided by its stream."""

    __slots__ = (
        "_closing", "_cut_off", "_flusher", "_make_stream", "_paused", "_queue", "_queued", "_tls", "_upgrading",
        "stream", "transport",
    )  # fmt: skip

    def __init__(
        self,
        make_stream: Callable[[TcpConnection], ClientStream],
        flusher: Flusher,
        tls: Callable[[str], ssl.SSLContext] | None,
    ) -> None:
        self._make_stream = make_stream
        self._flusher = flusher
        # Gives the context for STARTTLS to a host; None where TLS is there from the start, or not to be had.
        self._tls = tls
        self._queue: list[bytes] = []
        # Bytes that the transport has taken and the client has not read; set while writing is paused.
        self._queued = 0
        self._paused = False
        self._upgrading = False
        self._closing = False
        # Cuts a client off that does not take our goodbye.
        self._cut_off: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.stream: ClientStream = None  # type: ignore[assignment]

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.stream is None:
            _watch(transport.get_extra_info("socket"))
            self.stream = self._make_stream(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _received

    def buffer_updated(self, nbytes: int) -> None:
        if self._upgrading or self._closing:
            # Behind <starttls/> nothing may come in clear (RFC 6120 5.3.3); behind the end nothing counts.
            return
        self.stream.received(bytes(_received[:nbytes]))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._queue.clear()
        if self._cut_off is not None:
            self._cut_off.cancel()
        self.stream.disconnected(str(error) if error else "connection closed")

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    # --- called by the stream ---

    def write(self, data: bytes) -> None:
        """Sends at the end of this tick, with all that is written till then."""
        if not self._queue:
            self._flusher.soon(self)
        self._queue.append(data)

    def flush(self) -> None:
        queue = self._queue
        if not queue or self._upgrading:
            return
        self._queue = []
        if not self.transport.is_closing():
            self.transport.write(queue[0] if len(queue) == 1 else b"".join(queue))

    def send_queue_bytes(self) -> int:
        """Bytes that wait for the client to read."""
        if self.transport.is_closing():
            return 0
        return self.transport.get_write_buffer_size() + sum(map(len, self._queue))

    @property
    def slow(self) -> bool:
        """Whether the client does not read as fast as it is written to."""
        return self._paused

    def set_reading(self, reading: bool) -> None:
        if self._closing or self._upgrading or self.transport.is_closing():
            return
        if reading:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def close(self) -> None:
        """Sends what is queued, then closes; a client that does not read is cut off."""
        if self._closing:
            return
        self.flush()
        self._closing = True
        self.transport.close()
        self._cut_off = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.transport.abort)

    def abort(self) -> None:
        self._closing = True
        self.transport.abort()

    async def start_tls(self, host: str) -> bool:
        """Encrypts the connection (the <proceed/> is written already); False when the handshake failed.

        Nothing is written until the new transport is in place: the event loop can hand us decrypted bytes
        before this coroutine goes on, and an answer written then would leave in clear.
        """
        assert self._tls is not None
        self.flush()
        self._upgrading = True
        loop = asyncio.get_running_loop()
        early = _Early(self)
        try:
            transport = await loop.start_tls(
                self.transport,
                early,
                self._tls(host),
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
            )
        except (TimeoutError, OSError, ssl.SSLError, ConnectionError):
            transport = None
        if transport is None:
            self.abort()
            self.stream.disconnected("the TLS handshake failed")
            return False
        self.transport = transport
        self._upgrading = False
        self.stream.tls_started()
        early.hand_over()
        return True

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        return cast("ssl.SSLObject | None", self.transport.get_extra_info("ssl_object"))

    @property
    def peer(self) -> tuple[str, int]:
        name: Any = self.transport.get_extra_info("peername") or ("", 0)
        return (str(name[0]), int(name[1]))


class _Early(asyncio.BufferedProtocol):
    """Takes what a client sends behind its TLS handshake until the connection is ready for it."""

    def __init__(self, connection: TcpConnection) -> None:
        self._connection = connection
        self._bytes: list[bytes] = []
        self._ready = False

    def get_buffer(self, sizehint: int) -> memoryview:
        return _received

    def buffer_updated(self, nbytes: int) -> None:
        if self._ready:
            self._connection.buffer_updated(nbytes)
        else:
            self._bytes.append(bytes(_received[:nbytes]))

    def hand_over(self) -> None:
        self._ready = True
        if self._bytes:
            self._connection.stream.received(b"".join(self._bytes))
            self._bytes.clear()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._connection.connection_lost(error)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
