"""A raw XMPP client: it sends what it is told, also what no library would send."""

from __future__ import annotations

import asyncio
import base64
import ssl
from typing import Any, cast

from lxml import etree

from tidings.xmpp import ns

TIMEOUT = 10.0

Tree = etree._Element


def header(to: str, extra: str = "") -> str:
    """A client's stream header (RFC 6120 4.7)."""
    namespaces = f"xmlns='{ns.CLIENT}' xmlns:stream='{ns.STREAMS}'"
    return f"<?xml version='1.0'?><stream:stream {namespaces} version='1.0' to='{to}'{extra}>"


class Closed(Exception):
    """The server has closed the stream or the connection; `error` is its <stream:error/>, if there was one."""

    def __init__(self, error: Tree | None) -> None:
        self.error = error
        condition = etree.QName(error[0]).localname if error is not None and len(error) else "none"
        text = error.findtext(f"{{{ns.STREAM_ERRORS}}}text") if error is not None else None
        super().__init__(f"closed by the server, error: {condition}" + (f" ({text})" if text else ""))
        self.condition = condition


class RawClient:
    """One connection."""

    def __init__(self, host: str, port: int, domain: str) -> None:
        self._host = host
        self._port = port
        self.domain = domain
        self.jid = ""
        self.header: dict[str, str] = {}
        self.error: Tree | None = None
        self.footer = False
        # Whether it does what every client does when its server pings it.
        self.answers_pings = True
        # The connection is gone, as far as its user has noticed.
        self.lost = False
        self._reader: asyncio.StreamReader = None  # type: ignore[assignment]
        self._writer: asyncio.StreamWriter = None  # type: ignore[assignment]
        self._elements: list[Tree] = []
        self._numbers = 0
        self._parser = etree.XMLPullParser(("start", "end"), huge_tree=True)
        self._depth = 0

    # --- bytes ---

    async def connect(self, tls: bool = False) -> None:
        context = insecure_context() if tls else None
        self._reader, self._writer = await asyncio.wait_for(
            asyncio.open_connection(
                self._host, self._port, ssl=context, server_hostname=self.domain if tls else None
            ),
            TIMEOUT,
        )

    async def send(self, data: str | bytes) -> None:
        self._writer.write(data.encode() if isinstance(data, str) else data)
        try:
            await self._writer.drain()
        except ConnectionError:
            pass  # what the server had to say can still be read

    async def start_tls(self) -> None:
        await self._writer.start_tls(insecure_context(), server_hostname=self.domain)

    def restart(self) -> None:
        """A new stream begins in both directions."""
        self._parser = etree.XMLPullParser(("start", "end"), huge_tree=True)
        self._depth = 0
        self._elements.clear()

    async def _more(self, timeout: float) -> bool:
        """Reads until something is complete; False at the end."""
        try:
            data = await asyncio.wait_for(self._reader.read(65536), timeout)
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            return False
        self._parser.feed(data)
        for event, tree in self._parser.read_events():
            if event == "start":
                self._depth += 1
                if self._depth == 1:
                    self.header = {str(name): str(value) for name, value in cast(Tree, tree).items()}
            else:
                self._depth -= 1
                if self._depth == 1:
                    self._elements.append(tree)  # type: ignore[arg-type]
                elif self._depth == 0:
                    self.footer = True
        return True

    async def element(self, timeout: float = TIMEOUT) -> Tree:
        """The next first-level element. Raises Closed, TimeoutError."""
        while not self._elements:
            if self.footer or not await self._more(timeout):
                raise Closed(self.error)
        tree = self._elements.pop(0)
        if tree.tag == f"{{{ns.STREAMS}}}error":
            self.error = tree
            return await self.element(timeout)
        if self.answers_pings and len(tree) and tree[0].tag == f"{{{ns.PING}}}ping" and tree.get("type") == "get":
            if tree.get("from") == self.domain:
                # RFC 6120 8.2.3: so the server knows what has arrived.
                await self.send(f"<iq type='result' id='{tree.get('id')}' to='{self.domain}'/>")
                return await self.element(timeout)
        return tree

    async def raw_until(self, end: bytes, timeout: float = TIMEOUT) -> bytes:
        """Bytes as they come, up to and with `end`."""
        return await asyncio.wait_for(self._reader.readuntil(end), timeout)

    async def closed(self, timeout: float = TIMEOUT) -> Closed:
        """Waits until the server has closed; elements on the way are dropped."""
        while True:
            try:
                await self.element(timeout)
            except Closed as closed:
                return closed

    async def close(self) -> None:
        """Closes the stream properly, then the connection."""
        try:
            await self.send("</stream:stream>")
            async with asyncio.timeout(TIMEOUT):
                while not self.footer and await self._more(TIMEOUT):
                    pass
        except (TimeoutError, ConnectionError, etree.XMLSyntaxError):
            pass
        await self.abort()

    async def abort(self) -> None:
        """Drops the connection."""
        if self._writer is not None:
            self._writer.transport.abort()
            try:
                await self._writer.wait_closed()
            except (ConnectionError, ssl.SSLError):
                pass

    # --- the way to a session ---

    async def open(self, extra: str = "") -> Tree:
        """Sends a header; the features that come."""
        self.restart()
        await self.send(header(self.domain, extra))
        return await self.element()

    async def encrypt(self) -> Tree:
        """STARTTLS; the features behind it."""
        await self.open()
        await self.send(f"<starttls xmlns='{ns.TLS}'/>")
        proceed = await self.element()
        assert proceed.tag == f"{{{ns.TLS}}}proceed", proceed.tag
        await self.start_tls()
        return await self.open()

    async def authenticate(self, name: str, password: str) -> Tree:
        """PLAIN; the features behind it. Raises AssertionError when it fails."""
        data = base64.b64encode(f"\0{name}\0{password}".encode()).decode()
        await self.send(f"<auth xmlns='{ns.SASL}' mechanism='PLAIN'>{data}</auth>")
        answer = await self.element()
        assert answer.tag == f"{{{ns.SASL}}}success", etree.tostring(answer)
        return await self.open()

    async def bind(self, resource: str = "") -> str:
        wanted = f"<resource>{resource}</resource>" if resource else ""
        await self.send(f"<iq type='set' id='bind'><bind xmlns='{ns.BIND}'>{wanted}</bind></iq>")
        answer = await self.element()
        jid = answer.findtext(f".//{{{ns.BIND}}}jid")
        assert jid, etree.tostring(answer)
        self.jid = jid
        return jid

    async def log_in(self, name: str, password: str, resource: str = "", tls: bool = False) -> None:
        """All of it, over STARTTLS or, with `tls`, over TLS from the first byte."""
        await self.connect(tls)
        if tls:
            await self.open()
        else:
            await self.encrypt()
        await self.authenticate(name, password)
        await self.bind(resource)

    async def ping(self) -> list[Tree]:
        """What comes before the answer to a ping: all that the server had for us before it saw the ping."""
        self._numbers += 1
        id_ = f"sync-{self._numbers}"
        await self.send(f"<iq type='get' id='{id_}' to='{self.domain}'><ping xmlns='{ns.PING}'/></iq>")
        before: list[Tree] = []
        while True:
            tree = await self.element()
            if tree.get("id") == id_:
                return before
            before.append(tree)

    def put_back(self, elements: list[Tree]) -> None:
        self._elements[:0] = elements


def insecure_context() -> ssl.SSLContext:
    """For the self-made certificate of a test's server."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def show(tree: Any) -> str:
    return etree.tostring(tree, with_tail=False).decode()
