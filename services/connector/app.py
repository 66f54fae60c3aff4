"""How the connector is put together."""

from __future__ import annotations

import asyncio
import errno
import secrets
import ssl
from collections.abc import Callable

from services.connector.certificates import Certificates
from services.connector.client_stream import ClientStream
from services.connector.grpc_api import ConnectorApi
from services.connector.limits import Addresses, ClientLimits
from services.connector.router_link import RouterLinks
from services.connector.streams import Streams
from services.connector.transports.tcp import HANDSHAKE_TIMEOUT, Flusher, TcpConnection
from tidings.api.connector.v1.connector_pb2 import DESCRIPTOR
from tidings.api.connector.v1.connector_pb2_grpc import add_ConnectorServiceServicer_to_server
from tidings.api.router.v1.router_pb2 import TlsInfo
from tidings.cluster.node import NodeState
from tidings.kit.logging import get_logger
from tidings.kit.ports import PortInUse, port_holder
from tidings.kit.service import Context
from tidings.xmpp.parser import Limits
from tidings.xmpp.stream import ServerStream, StreamConfig

log = get_logger("connector")

# Connections that the kernel queues before we accept them: a burst of log-ins after a restart.
BACKLOG = 2048
# Seconds to wait for a router before the client ports open anyway: clients are then told to try again.
ROUTER_WAIT = 30.0
# Seconds that streams get to say goodbye when the connector stops.
STOP_GRACE = 1.0


def build(context: Context) -> Connector:
    return Connector(context)


class Connector:
    """The connector service."""

    def __init__(self, context: Context) -> None:
        options = context.options
        self._options = options
        self._member = context.member
        self._incarnation = context.node.incarnation
        # Connectors of the same host that share our ports: who connects anew may reach any of them.
        self._sharing_host = context.node.host if options["c2s-reuse-port"] else ""
        self._tasks = context.tasks
        self._hosts: list[str] = options["virt-hosts"]
        self._certificates = Certificates(self._hosts, options)
        self._limits = ClientLimits.of(options)
        self._addresses = Addresses(options["max-streams-per-address"])
        self._flusher = Flusher()
        self.streams = Streams(
            lambda stream: self._links.choose(stream),
            lambda router: self._links.to(router),
            lambda router: self._links.other(router),
            lambda router: self._links.now(router),
            self._addresses,
            self._tasks.spawn,
        )
        self._links = RouterLinks(
            self.streams, context.member, context.channels, context.node, self._tasks, options["c2s-location"]
        )
        self._servers: list[asyncio.Server] = []
        parser_limits = Limits(
            stanza_bytes=options["max-stanza-bytes"],
            depth=options["max-stanza-depth"],
            attributes=options["max-stanza-attributes"],
        )
        self._config = StreamConfig(
            hosts=frozenset(self._hosts),
            tls_available=True,
            tls_required=not options["c2s-allow-plaintext"],
            bytes_before_auth=options["max-bytes-before-auth"],
            limits=parser_limits,
        )
        context.server.add(
            add_ConnectorServiceServicer_to_server,
            ConnectorApi(self.streams),
            DESCRIPTOR.services_by_name["ConnectorService"].full_name,
        )
        metrics = context.metrics
        metrics.gauged("streams", "Open client streams", lambda: len(self.streams))
        metrics.counted("streams_opened", "Client connections accepted", lambda: self.streams.opened)
        metrics.counted("streams_refused", "Connections refused by a limit", lambda: self.streams.refused)
        metrics.counted("streams_slowed", "Times a client was slowed by its rate", lambda: self.streams.slowed)

    # --- life ---

    async def start(self) -> None:
        await asyncio.to_thread(self._certificates.load)
        if self._certificates.self_made:
            log.info("self_made_certificate", hosts=self._certificates.self_made)
        self._links.start()
        try:
            async with asyncio.timeout(ROUTER_WAIT):
                await self._links.attached()
        except TimeoutError:
            log.warning("no_router_yet", waited=ROUTER_WAIT)
        addresses: list[str] = self._options["bind-address"] or [""]
        for address in addresses:
            for port in self._options["c2s-ports"]:
                await self._listen(address, port, self._plain)
            for port in self._options["c2s-tls-ports"]:
                await self._listen(address, port, self._direct_tls, self._certificates.context())

    async def _listen(
        self,
        address: str,
        port: int,
        factory: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                factory,
                address or None,
                port,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT if tls is not None else None,
                reuse_port=self._options["c2s-reuse-port"],
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(address, port, port_holder(port, address)) from error
            raise
        self._servers.append(server)

    async def drain(self) -> None:
        """Takes no new streams, and tells those that are there where to go."""
        for server in self._servers:
            server.close()
        elsewhere = self._elsewhere()
        for stream in self.streams:
            stream.drain(elsewhere)
        await self._streams_gone(self._options["drain-timeout"] / 2)

    def _elsewhere(self) -> str:
        """Another node's connector, as <see-other-host/> has it (RFC 6120 4.9.3.19); '' where there is none."""
        others = [
            node
            for node in self._member.view.with_service("connector")
            if node.state is NodeState.UP
            and node.incarnation != self._incarnation
            and node.host != self._sharing_host
        ]
        if not others:
            return ""
        node = secrets.choice(others)
        host = node.secondary or node.address
        ports = self._options["c2s-ports"]
        return f"[{host}]:{ports[0]}" if ":" in host else f"{host}:{ports[0]}"

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        for stream in self.streams:
            stream.close("system-shutdown")
        await self._streams_gone(STOP_GRACE)

    async def _streams_gone(self, timeout: float) -> None:
        # What was queued for the clients leaves with the next ticks.
        deadline = asyncio.get_running_loop().time() + timeout
        while len(self.streams) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)

    # --- connections ---

    def _plain(self) -> TcpConnection:
        return TcpConnection(lambda connection: self._stream(connection, False), self._flusher, self._tls_context)

    def _direct_tls(self) -> TcpConnection:
        return TcpConnection(lambda connection: self._stream(connection, True), self._flusher, None)

    def _tls_context(self, host: str) -> ssl.SSLContext:
        return self._certificates.context(host)

    def _stream(self, connection: TcpConnection, encrypted: bool) -> ClientStream:
        core = ServerStream(self._config)
        if encrypted:
            core.tls_started()
        stream = ClientStream(
            self.streams,
            self.streams.next_number(),
            connection,
            core,
            self._limits,
            lambda: self._tls_info(connection),
        )
        if not self._addresses.enter(connection.peer[0]):
            self.streams.refused += 1
            stream.refuse()
            return stream
        self.streams.add(stream)
        return stream

    def _tls_info(self, connection: TcpConnection) -> TlsInfo | None:
        ssl_object = connection.ssl_object
        if ssl_object is None:
            return None
        cipher = ssl_object.cipher()
        return TlsInfo(
            version=ssl_object.version() or "",
            cipher=cipher[0] if cipher else "",
            server_end_point=self._certificates.shown(ssl_object).server_end_point,
        )
