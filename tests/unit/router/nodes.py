"""Routers and a connector in one process: all of them real, over in-process gRPC, on one SQLite database.

What a test decides: the views, when the database answers, and what is slow.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.connector.client_stream import ClientStream
from services.connector.limits import Addresses, ClientLimits
from services.connector.router_link import RouterLinks
from services.connector.streams import Streams
from services.router.app import Router
from services.router.authentication import derive_all
from services.router.messages import LOOK
from services.router.messages_sql import SqlMessageStore
from services.router.sessions import Session
from services.router.store import SessionRow
from services.router.store_sql import SqlAccountStore
from services.router.store_sql_sessions import SqlSessionTable
from tests.unit.router.unsure_database import UnsureDatabase
from tidings.cluster.hashing import rendezvous
from tidings.cluster.node import Node, NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.logging import configure
from tidings.kit.metrics import Metrics
from tidings.kit.options import load
from tidings.kit.service import Context
from tidings.kit.tasks import Tasks
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream import ServerStream, StreamConfig

HOST = "example.org"

UP, DRAINING, SUSPECT, FAILED = NodeState.UP, NodeState.DRAINING, NodeState.SUSPECT, NodeState.FAILED


class Membership:
    """A node's side of membership, as far as routers and connectors ask for it: a test tells the view."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.view = ClusterView()
        self._listeners: list[Callable[[ClusterView], None]] = []
        self._changed = asyncio.Event()
        # Whether no registry has taken a beat for long; and whether the cluster has put the node out.
        self.unsure = self.is_put_out = False
        # How often it was asked.
        self.asked = 0

    async def is_in(self) -> bool:
        self.asked += 1
        return not self.unsure

    def tell(self, view: ClusterView) -> None:
        self.view = view
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener(view)

    def on_change(self, listener: Callable[[ClusterView], None]) -> None:
        self._listeners.append(listener)

    async def wait_until(self, condition: Callable[[ClusterView], bool], timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while not condition(self.view):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def newer_view(self, timeout: float) -> bool:
        version = self.view.version
        return await self.wait_until(lambda view: view.version != version, timeout)

    def reaches(self, node: Node) -> None: ...

    def report(self, node: Node, observation: str) -> None: ...

    def cleaning(self, incarnation: str) -> None: ...

    def cleaned(self, incarnation: str) -> None: ...


class Served:
    """What a node serves, to each caller under its own name."""

    def __init__(self) -> None:
        self._added: list[tuple[Any, Any, str]] = []
        self._servers: dict[str, ClusterServer] = {}

    def add(self, add_to_server: Any, servicer: Any, service: str) -> None:
        self._added.append((add_to_server, servicer, service))

    def channel(self, caller: Node) -> Any:
        server = self._servers.get(caller.incarnation)
        if server is None:
            own = Caller("node", caller.hostname, frozenset(caller.services), caller.incarnation)
            nothing: Any = None
            server = ClusterServer([], 0, nothing, bytes, lambda _leaf: None, own)
            self._servers[caller.incarnation] = server
            for added in self._added:
                server.add(*added)
        return server.local_channel()

    async def stop(self) -> None:
        for server in self._servers.values():
            await server.stop(0)


class Channels:
    """The channels of one node."""

    def __init__(self, own: Node, nodes: Nodes) -> None:
        self._own = own
        self._nodes = nodes

    def to(self, node: Node) -> Any:
        return _Slow(self._nodes, self._nodes.served[node.incarnation].channel(self._own))


class _Slow:
    """A channel whose answers to single calls are under way for a while."""

    def __init__(self, nodes: Nodes, channel: Any) -> None:
        self._nodes = nodes
        self._channel = channel
        self.stream_stream = channel.stream_stream
        self.unary_stream = channel.unary_stream

    def unary_unary(self, *arguments: Any, **keywords: Any) -> Any:
        call = self._channel.unary_unary(*arguments, **keywords)

        async def slow(*arguments: Any, **keywords: Any) -> Any:
            answer = await call(*arguments, **keywords)
            await asyncio.sleep(self._nodes.latency)
            return answer

        return slow


class Client:
    """A client without a socket: the connection of a stream, and what the stream writes to it."""

    peer = ("192.0.2.1", 5222)
    slow = False

    def __init__(self, nodes: Nodes, name: str, resource: str = "r") -> None:
        self.name = name
        self._resource = resource
        self.written = ""
        self.closed = False
        self._reading = True
        self._waiting: list[bytes] = []
        core = ServerStream(StreamConfig(frozenset({HOST}), tls_available=False, tls_required=False))
        self.stream = ClientStream(
            nodes.streams, nodes.streams.next_number(), self, core, ClientLimits(0, 0, 0, 0), lambda: None
        )
        nodes.streams.add(self.stream)

    # --- the connection ---

    def write(self, data: bytes) -> None:
        self.written += data.decode()

    def set_reading(self, reading: bool) -> None:
        self._reading = reading
        while self._waiting and self._reading:
            self.stream.received(self._waiting.pop(0))

    def send_queue_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    abort = close

    async def start_tls(self, host: str) -> bool:
        return False

    # --- the client ---

    def send(self, text: str) -> None:
        self._waiting.append(text.encode())
        self.set_reading(self._reading)

    def say(self, to: str, number: int, type_: str = "chat") -> None:
        self.send(f"<message to='{to}' type='{type_}'><body>{number}</body></message>")

    def disconnect(self) -> None:
        self.closed = True
        self.stream.disconnected("connection reset")

    def numbers(self) -> list[int]:
        return [int(text) for text in re.findall("<body>([0-9]+)</body>", self.written)]

    async def until(self, text: str) -> None:
        """Waits until something has been written behind what was asked for the last time."""
        await soon(lambda: text in self.written, f"{text!r} for {self.name}, who has {self.written!r}")

    async def open(self, wanted: str) -> None:
        self.send(f"<stream:stream to='{HOST}' version='1.0' xmlns='jabber:client' xmlns:stream='{STREAMS}'>")
        await self.until(wanted)

    async def authenticate(self) -> None:
        plain = b64encode(f"\0{self.name}\0secret".encode()).decode()
        self.send(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>")
        await self.until("<success")

    def bind(self) -> None:
        self.written = ""
        self.send(f"<iq type='set' id='b'><bind xmlns='{BIND}'><resource>{self._resource}</resource></bind></iq>")

    async def come_silently(self) -> None:
        """Logs in, and sends no presence."""
        await self.open("<mechanisms")
        await self.authenticate()
        await self.open("<bind")
        self.bind()
        await self.until("<jid>")

    async def come(self) -> None:
        """Logs in up to its first presence, which may have to wait for something."""
        await self.come_silently()
        self.written = ""
        self.send("<presence/>")

    async def log_in(self) -> None:
        await self.come()
        await self.until("<presence")

    async def answered(self) -> None:
        """Waits until all that it has sent before is dealt with."""
        self.send("<iq type='get' id='behind'><ping xmlns='urn:xmpp:ping'/></iq>")
        await self.until('id="behind"')


STREAMS = "http://etherx.jabber.org/streams"
BIND = "urn:ietf:params:xml:ns:xmpp-bind"


class Nodes:
    """Routers by name, and one connector."""

    def __init__(self, folder: Path, strategy: str) -> None:
        self._folder = folder
        # Seconds that answers are under way.
        self.latency = 0.0
        # Each node's, and the test's own.
        self.databases: dict[str, UnsureDatabase] = {"": self._database()}
        self.table = SqlSessionTable(self.databases[""])
        self.accounts = SqlAccountStore(self.databases[""])
        self.tasks = Tasks()
        # Tasks of routers that died of an exception: in a process it would end with them.
        self.died: list[str] = []
        self.options = load(
            [f"--virt-hosts={HOST}", f"--sm-cluster-strategy-class={strategy}", "--c2s-allow-plaintext=true"], {}
        )
        self.routers: dict[str, Router] = {}
        self.members: dict[str, Membership] = {}
        self.served: dict[str, Served] = {}
        self._nodes: dict[str, Node] = {}
        self._version = 0
        self._owners: dict[str, Tasks] = {}
        connector = Node("front", "front", "127.0.0.1", 1, ("connector",), UP)
        self.members["front"] = Membership(connector)
        # The router where streams go, while the connector has a link to it.
        self.prefers = ""
        self.streams = Streams(
            self._choose,
            lambda router: self._links.to(router),
            self._other,
            lambda router: self._links.now(router),
            Addresses(0),
            self.tasks.spawn,
        )
        self._links = RouterLinks(
            self.streams,
            self.members["front"],
            Channels(connector, self),
            connector,
            self.tasks,  # type: ignore[arg-type]
        )

    def _choose(self, stream: ClientStream) -> Any:
        return self._links._links.get(self.prefers) or self._links.choose(stream)

    async def _other(self, router: str) -> Any:
        """Where a stream goes when its router is gone."""
        preferred = self._links._links.get(self.prefers) if self.prefers != router else None
        return preferred or await self._links.other(router)

    def _database(self) -> UnsureDatabase:
        return UnsureDatabase(self._folder / "database.sqlite")

    async def start(self, *names: str) -> None:
        await self.databases[""].start()
        for name in names:
            await self._start(name)
        self.keys = await asyncio.to_thread(derive_all, "secret", 4096)

    def served_by(self, name: str) -> Served:
        """What a node serves that is no router."""
        return self.served.setdefault(name, Served())

    async def _start(self, name: str) -> None:
        node = self._nodes[name] = Node(name, name, "127.0.0.1", 1, ("router",), NodeState.JOINING)
        member = self.members[name] = Membership(node)
        served = self.served[name] = Served()
        database = self.databases[name] = self._database()
        await database.start()
        owner = self._owners[name] = Tasks(lambda task, error: self.died.append(f"{task}: {error!r}"))
        context: Any = Context(
            self.options,
            node,
            member,
            Channels(node, self),
            served,
            database,
            owner,
            Metrics(),  # type: ignore[arg-type]
        )
        router = self.routers[name] = Router(context)
        await router.start()

    async def kill(self, name: str) -> None:
        """A router is gone from one moment to the next, with all that it had in memory; the others know."""
        router = self.routers.pop(name)
        for session in router.sessions:
            session.link = session.holder = None
        await self._owners.pop(name).stop()
        await self.served[name].stop()
        await self.databases.pop(name).die()
        del self.members[name]
        self.tell(**dict.fromkeys(self.routers, UP))

    async def stop(self) -> None:
        await self.tasks.stop()
        for served in self.served.values():
            await served.stop()
        for owner in self._owners.values():
            await owner.stop()
        for router in self.routers.values():
            await router.stop()
        for database in self.databases.values():
            await database.stop()

    # --- the views ---

    def view(self, **states: NodeState) -> ClusterView:
        """A newer view, of routers in these states."""
        self._version += 1
        nodes = [Node(name, name, "127.0.0.1", 1, (_service(name),), state) for name, state in states.items()]
        return ClusterView(self._version, [*nodes, self.members["front"].node])

    def tell(self, *names: str, **states: NodeState) -> ClusterView:
        """Tells a newer view to some nodes, or to all."""
        view = self.view(**states)
        for name in names or self.members:
            self.members[name].tell(view)
        return view

    async def up(self, *names: str) -> None:
        """Tells that these routers serve, and waits until they do."""
        self.tell(**dict.fromkeys(names, UP))
        self._links.start()
        await soon(
            lambda: set(names) <= set(self._links._links), f"the connector has links to {list(self._links._links)}"
        )

    # --- accounts and clients ---

    async def account(self, name: str) -> None:
        await self.accounts.create(HOST, name, self.keys)

    async def client(self, name: str, at: str = "") -> Client:
        """A new account with a session; `at`: the router where its stream begins."""
        await self.account(name)
        self.prefers = at
        client = Client(self, name)
        await client.log_in()
        return client

    def session(self, router: str, name: str) -> Session | None:
        """The session that a router has."""
        return self.routers[router].sessions.of(f"{name}@{HOST}").get("r")

    async def is_at(self, router: str, name: str) -> None:
        """Waits until a router has a session, its stream is attached there, and nobody else has it."""

        def has(one: str) -> bool:
            session = self.session(one, name)
            return session is not None and (one != router or not session.moving)

        await soon(lambda: [one for one in self.routers if has(one)] == [router], f"{name} is at {router}")

    async def waiting(self, name: str, count: int) -> None:
        """Waits until just so many messages wait for an account, by the database."""
        account, found, store = Jid(name, HOST, ""), -1, SqlMessageStore(self.databases[""])
        try:
            async with asyncio.timeout(5.0):
                while (found := await store.pending_count(account)) != count:
                    await asyncio.sleep(LOOK)
        except TimeoutError:
            raise AssertionError(f"not in time: {count} messages wait for {name}, but {found}") from None

    async def moves(self, name: str, to: str) -> None:
        """Waits until the table says that an account's session is at a router; whether it is there yet or not."""
        async with asyncio.timeout(5.0):
            while [row.router for row in await self.rows(name)] != [to]:
                await asyncio.sleep(LOOK)

    def late(self, name: str) -> asyncio.Event:
        """From now on a node learns that its changes are committed only when this is set."""
        told = asyncio.Event()

        async def until_told() -> None:
            await told.wait()

        self.databases[name].behind = until_told
        return told

    def looks_for_unsafe(self, router: str) -> list[tuple[str, ...]]:
        """From now on: the flows of which a router has looked whether others have made safe what they have of it."""
        looks: list[tuple[str, ...]] = []

        def is_unsafe(flow: tuple[str, ...]) -> bool:
            looks.append(flow)
            return self.routers[router]._links.is_unsafe(flow)

        self.routers[router]._safety.is_unsafe_elsewhere = is_unsafe
        return looks

    def is_waited_for(self, router: str, name: str) -> bool:
        """Whether something waits at a router for a session that is arriving there."""
        arrival = self.routers[router].sessions.arrival(f"{name}@{HOST}")
        return arrival is not None and len(arrival._waiters) > 0

    async def rows(self, name: str) -> list[SessionRow]:
        return await self.table.of_account(Jid(name, HOST, ""))


def _service(name: str) -> str:
    return name if name == "registry" else "router"


def at_home(stem: str, **homes: str) -> str:
    """A name whose account has these homes (strategy `home`): `ab="b"` says that of routers a and b it is b."""
    return next(
        name for number in range(10_000)
        if all(rendezvous(f"{(name := f'{stem}{number}')}@{HOST}", list(of)) == home for of, home in homes.items())
    )  # fmt: skip


@asynccontextmanager
async def running(folder: Path, *names: str, strategy: str = "home") -> AsyncIterator[Nodes]:
    """Routers that serve and know each other."""
    configure("json")
    nodes = Nodes(folder, strategy)
    try:
        await nodes.start(*names)
        yield nodes
    finally:
        await nodes.stop()
    assert nodes.died == [], f"a task of a router died: {nodes.died}"


async def soon(condition: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    """Waits for a condition."""
    try:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not in time: {what}") from None
