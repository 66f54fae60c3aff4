"""A server of one connection at a time that does what a test says: what a real one would do only with luck."""

from __future__ import annotations

import asyncio
from types import TracebackType
from xml.etree.ElementTree import Element

from tests.drills.stream import Stream
from tidings.xmpp import ns

HEADER = f"<?xml version='1.0'?><stream:stream xmlns='{ns.CLIENT}' xmlns:stream='{ns.STREAMS}' version='1.0' from='localhost'>"
TIMEOUT = 5.0


class Connection:
    """The server's side of one connection."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def write(self, data: str | bytes) -> None:
        assert self.stream.write(data)

    async def read(self) -> Element:
        """What the client wrote next. Raises Lost, TimeoutError."""
        return await self.stream.element(TIMEOUT)

    async def expect(self, name: str) -> Element:
        element = await self.read()
        assert element.tag.partition("}")[2] == name, element.tag
        return element

    async def _header(self, features: str) -> None:
        await self.stream.opened(TIMEOUT)
        self.write(f"{HEADER}<stream:features>{features}</stream:features>")

    async def log_in(self) -> None:
        """Up to the features behind authentication."""
        await self._header(f"<mechanisms xmlns='{ns.SASL}'><mechanism>PLAIN</mechanism></mechanisms>")
        await self.expect("auth")
        self.stream.restart()
        self.write(f"<success xmlns='{ns.SASL}'/>")
        await self._header(f"<bind xmlns='{ns.BIND}'/><sm xmlns='{ns.SM}'/>")

    async def bind(self, jid: str = "a@localhost/1") -> None:
        asked = await self.expect("iq")
        self.write(f"<iq type='result' id='{asked.get('id')}'><bind xmlns='{ns.BIND}'><jid>{jid}</jid></bind></iq>")

    async def enable(self, id_: str = "r1", more: str = "") -> Element:
        asked = await self.expect("enable")
        self.write(f"<enabled xmlns='{ns.SM}' resume='true' id='{id_}' {more}/>")
        return asked

    async def session(self) -> None:
        """A new session with XEP-0198, up to its initial presence."""
        await self.log_in()
        await self.bind()
        await self.enable()
        await self.expect("presence")

    async def plain_session(self) -> None:
        await self.log_in()
        await self.bind()
        await self.expect("presence")

    async def resume(self, h: int) -> Element:
        asked = await self.expect("resume")
        self.write(f"<resumed xmlns='{ns.SM}' h='{h}' previd='{asked.get('previd')}'/>")
        return asked

    def acknowledge(self, h: int) -> None:
        self.write(f"<a xmlns='{ns.SM}' h='{h}'/>")

    def request(self) -> None:
        self.write(f"<r xmlns='{ns.SM}'/>")

    def message(self, key: str, body: str = "") -> bytes:
        text = body or f"body of {key}"
        return f"<message id='{key}' type='chat' from='b@localhost/1'><body>{text}</body></message>".encode()


class ScriptedPeer:
    """Listens on loopback; each connection waits for its script."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
        self._connections: asyncio.Queue[Connection] = asyncio.Queue()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.get_running_loop().create_server(self._accept, self._address, port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self) -> Stream:
        stream = Stream(serves=True)
        self._connections.put_nowait(Connection(stream))
        return stream

    async def accept(self) -> Connection:
        async with asyncio.timeout(TIMEOUT):
            return await self._connections.get()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def __aenter__(self) -> ScriptedPeer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
