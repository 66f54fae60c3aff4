"""The router's modules: one XEP, one file, one object with everything that the file may do.

A module exports a `ModuleSpec` and names it in the entry-point group `tidings.modules`; its `load` gets a
`Module` and registers what it answers and what it wants to see:

    MODULE = ModuleSpec("ping", xep="XEP-0199", version="2.0.1", load=load)

    def load(module: Module) -> None:
        module.feature(ns.PING)
        module.on_iq("{urn:xmpp:ping}ping", lambda iq: b"", types=("get",))

Handlers may be plain or coroutine functions. While a coroutine runs, later stanzas of the same session wait
behind it, so that nothing overtakes; other sessions go on. A handler refuses by raising `StanzaError`; any
other exception becomes <internal-server-error/> and a log line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tidings.api.common.v1.stanza_pb2 import Envelope, StanzaKind
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import to_tree

if TYPE_CHECKING:
    from lxml.etree import _Element as Tree

    from tidings.kit.metrics import Metrics
    from tidings.kit.options import Option, Options

GROUP = "tidings.modules"

MESSAGE = StanzaKind.STANZA_KIND_MESSAGE
PRESENCE = StanzaKind.STANZA_KIND_PRESENCE
IQ = StanzaKind.STANZA_KIND_IQ
NONZA = StanzaKind.STANZA_KIND_NONZA

# The names of the elements, and back.
KIND_NAMES = {MESSAGE: "message", PRESENCE: "presence", IQ: "iq"}
KINDS = {name: kind for kind, name in KIND_NAMES.items()}

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """What is known of a module without loading it."""

    name: str
    load: Callable[[Module], None]
    # Which specification it implements: "XEP-0199", "RFC 6121"; with the version that was followed.
    xep: str = ""
    version: str = ""
    # Modules that must be loaded before it.
    needs: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()


class Session(Protocol):
    """A bound full JID at this router."""

    id: str
    jid: Jid
    # The bare JID as text: the key of the account.
    account: str
    lang: str
    # RFC 6121 4.7.2.3; meaningful while `presence` is set.
    priority: int
    # The last broadcast presence, as stamped; None while the session is unavailable.
    presence: bytes | None
    # It asked for the roster (RFC 6121 2.1.6).
    interested: bool
    # Whom it sent presence directly (RFC 6121 4.6): JIDs as text.
    directed: set[str]
    # Values of modules, by a key of their own. They go with the session to another router.
    notes: dict[str, bytes]


class Stanza:
    """A stanza as a module sees it: routing fields at hand, the tree built when asked for."""

    __slots__ = ("_tree", "after", "envelope", "session")

    def __init__(self, envelope: Envelope, session: Session | None = None) -> None:
        self.envelope = envelope
        # The session of this router that sent it; None when it came from elsewhere.
        self.session = session
        self._tree: Tree | None = None
        # What is to happen behind the answer (see `Module.after`).
        self.after: Callable[[], None] | None = None

    @property
    def kind(self) -> int:
        return self.envelope.kind

    @property
    def type(self) -> str:
        return self.envelope.type

    @property
    def id(self) -> str:
        return self.envelope.id

    @property
    def from_(self) -> Jid:
        return Jid.parse(self.envelope.from_jid)

    @property
    def to(self) -> Jid:
        """Where it goes; the sender's own account where it has no `to` (RFC 6120 10.3)."""
        if self.envelope.to_jid:
            return Jid.parse(self.envelope.to_jid)
        return self.from_.bare

    @property
    def raw(self) -> bytes:
        return self.envelope.stanza

    @property
    def children(self) -> Sequence[str]:
        return self.envelope.children

    @property
    def tree(self) -> Tree:
        if self._tree is None:
            self._tree = to_tree(self.envelope.stanza)
        return self._tree

    @property
    def payload(self) -> Tree:
        """The one child of an IQ request (RFC 6120 8.2.3), checked by the router before handlers see it."""
        return self.tree[0]


class Where(Enum):
    """At which addresses a request is answered."""

    # The domain of a virtual host.
    SERVER = "server"
    # The bare JID of a local account, for which the server answers (RFC 6121 8.5.2.1.3).
    ACCOUNT = "account"


# What handlers return. An IQ's: the payload of the result (b"" for none). A stanza's: True when it was
# consumed and goes no further.
IqHandler = Callable[[Stanza], bytes | Awaitable[bytes]]
StanzaHandler = Callable[[Stanza], bool | Awaitable[bool]]
SessionHandler = Callable[[Session], Awaitable[None] | None]
EndHandler = Callable[[Session, bool], Awaitable[None] | None]
# The session, its presence as it was sent, and the type: '' or "unavailable".
PresenceHandler = Callable[[Session, bytes, str], None]
# The session, and the receiver; '' for all.
DirectedHandler = Callable[[Session, str], None]
AccountHandler = Callable[[Jid], Awaitable[None] | None]
# The account and the content of a note; the answer, or None when this router has nothing to do with it.
NoteHandler = Callable[[Jid, bytes], Awaitable[bytes | None] | bytes | None]
# On a stream that nobody is authenticated on: the request, and the virtual host of the stream.
EarlyIqHandler = Callable[[Stanza, str], bytes | Awaitable[bytes]]


class RouterPort(Protocol):
    """What modules may ask of the router."""

    def sessions(self, account: str) -> Mapping[str, Session]:
        """The sessions of a bare JID at this router, by resource. Other routers may have more of them, under
        some strategies: `ask` and `tell` reach those."""

    async def ask(self, module: str, account: str, content: bytes) -> list[bytes]:
        """What the same module in the other routers that may have sessions of an account answers to a note.

        Not guaranteed: that a router which dies meanwhile answers."""

    def tell(self, module: str, account: str, content: bytes) -> None:
        """The same without waiting for answers; the note goes behind all that was sent to the account."""

    async def tell_bound(self, module: str, account: str, content: bytes) -> None:
        """The same, to the routers that have sessions of the account now, also those that the strategy does not know
        of yet; returns when they have dealt with it.

        Not guaranteed: that one which hangs, or dies meanwhile, has."""

    async def known(self) -> None:
        """Waits until the other routers know what the strategy has told them of sessions here."""

    def route(self, envelope: Envelope) -> None:
        """Sends a stanza on its way by the rules, as if it had come from its `from_jid`. Returns at once."""

    def deliver(self, session: Session, envelope: Envelope) -> None:
        """Writes a stanza to one session, in order, without any further rule and past `hold`."""

    def hold(self, session: Session) -> None:
        """Keeps back what is routed to a session, until `release`: stored messages go first."""

    def release(self, session: Session) -> None: ...

    def is_open(self, session: Session) -> bool:
        """Whether what is delivered to a session now goes to its stream: it has not ended, nor is it between two
        routers."""

    def in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Does something that nobody waits for. What it raises is logged; it is cut off when the router stops."""

    def is_settled(self, account: str) -> bool:
        """False while sessions of an account may be at a router that has died: neither taken over nor ended yet."""

    async def settled(self, account: str) -> None:
        """Waits until none is, some seconds at most."""

    async def account_exists(self, jid: Jid) -> bool: ...

    def delete_account(self, account: Jid) -> None:
        """Ends an account's sessions and removes all that is stored for it, in the background."""

    def store(self, port: Callable[..., P]) -> P:
        """The implementation of a storage port that this router was given."""

    def components(self) -> Mapping[str, str]:
        """The domains that components serve now, with their titles."""


@dataclass(slots=True)
class Hooks:
    """All that modules have registered. The router reads it; the order is that of registration."""

    iq: dict[tuple[Where, str, str], IqHandler] = field(default_factory=dict)
    # Before authentication, by type and payload.
    early_iq: dict[tuple[str, str], EarlyIqHandler] = field(default_factory=dict)
    # By kind. A handler is called when the stanza has one of its children, or always with an empty set.
    sent: dict[int, list[tuple[frozenset[str], StanzaHandler]]] = field(default_factory=dict)
    received: dict[int, list[tuple[frozenset[str], StanzaHandler]]] = field(default_factory=dict)
    undelivered: list[StanzaHandler] = field(default_factory=list)
    session_started: list[SessionHandler] = field(default_factory=list)
    session_available: list[SessionHandler] = field(default_factory=list)
    session_attached: list[SessionHandler] = field(default_factory=list)
    presence_changed: list[PresenceHandler] = field(default_factory=list)
    directed_changed: list[DirectedHandler] = field(default_factory=list)
    session_ended: list[EndHandler] = field(default_factory=list)
    session_left: list[Callable[[Session], None]] = field(default_factory=list)
    notes: dict[str, NoteHandler] = field(default_factory=dict)
    account_deleted: list[AccountHandler] = field(default_factory=list)
    stream_features: list[tuple[bool, Callable[[str], bytes]]] = field(default_factory=list)
    server_features: list[str] = field(default_factory=list)
    account_features: list[str] = field(default_factory=list)
    account_identities: list[tuple[str, str, str]] = field(default_factory=list)


class Module:
    """The one object that a module gets: everything that it may do."""

    def __init__(
        self, spec: ModuleSpec, hooks: Hooks, router: RouterPort, options: Options, metrics: Metrics, log: Any
    ) -> None:
        self._spec = spec
        self._hooks = hooks
        self.router = router
        self.options = options
        self.metrics = metrics
        # structlog, with the module's name bound.
        self.log = log

    # --- what it is ---

    def feature(self, namespace: str, *where: Where) -> None:
        """Announces a feature (XEP-0030), at the server unless `where` says otherwise."""
        for place in where or (Where.SERVER,):
            listed = self._hooks.server_features if place is Where.SERVER else self._hooks.account_features
            if namespace not in listed:
                listed.append(namespace)

    def account_identity(self, category: str, type_: str, name: str = "") -> None:
        """Announces an identity of every account (XEP-0030)."""
        self._hooks.account_identities.append((category, type_, name))

    def stream_feature(self, make: Callable[[str], bytes], *, authenticated: bool = True) -> None:
        """Adds a child to <stream:features/> after (or before) authentication; `make` gets the host."""
        self._hooks.stream_features.append((authenticated, make))

    def announced(self, where: Where) -> list[str]:
        """The features that all modules announce there, sorted."""
        listed = self._hooks.server_features if where is Where.SERVER else self._hooks.account_features
        return sorted(listed)

    def account_identities(self) -> list[tuple[str, str, str]]:
        """The identities of accounts: (category, type, name)."""
        return list(self._hooks.account_identities)

    # --- what it answers and sees ---

    def on_iq(
        self,
        payload: str,
        handler: IqHandler,
        *,
        types: Collection[str] = ("get", "set"),
        where: Collection[Where] = (Where.SERVER,),
    ) -> None:
        """Answers IQ requests whose payload has this name (`{namespace}name`).

        Raises ValueError when another module answers them already.
        """
        for place in where:
            for type_ in types:
                key = (place, type_, payload)
                if key in self._hooks.iq:
                    raise ValueError(f"{self._spec.name}: IQ {type_} {payload} at {place.value} is taken")
                self._hooks.iq[key] = handler

    def on_iq_before_authentication(self, payload: str, handler: EarlyIqHandler, *, types: Collection[str]) -> None:
        """Answers IQ requests to the server on streams that are not authenticated yet."""
        for type_ in types:
            self._hooks.early_iq[type_, payload] = handler

    def on_sent(self, kind: int, handler: StanzaHandler, children: Collection[str] = ()) -> None:
        """Sees stanzas that sessions of this router send, before they are routed."""
        self._hooks.sent.setdefault(kind, []).append((frozenset(children), handler))

    def on_received(self, kind: int, handler: StanzaHandler, children: Collection[str] = ()) -> None:
        """Sees stanzas addressed to local accounts, before the delivery rules apply."""
        self._hooks.received.setdefault(kind, []).append((frozenset(children), handler))

    def on_undelivered(self, handler: StanzaHandler) -> None:
        """Gets a message that RFC 6121 8.5 wants stored: no session took it. True: it is kept."""
        self._hooks.undelivered.append(handler)

    def on_session_started(self, handler: SessionHandler) -> None:
        """A session was bound."""
        self._hooks.session_started.append(handler)

    def on_session_available(self, handler: SessionHandler) -> None:
        """A session sent initial presence, or its priority rose from below zero."""
        self._hooks.session_available.append(handler)

    def on_session_attached(self, handler: SessionHandler) -> None:
        """A session came from another router, and its stream is attached here."""
        self._hooks.session_attached.append(handler)

    def on_presence_changed(self, handler: PresenceHandler) -> None:
        """A session has broadcast presence that was in order, or became unavailable."""
        self._hooks.presence_changed.append(handler)

    def on_session_ended(self, handler: EndHandler) -> None:
        """A session is over; the flag says whether it was available till then. A handler that raises DatabaseAway is
        called again."""
        self._hooks.session_ended.append(handler)

    def on_session_left(self, handler: Callable[[Session], None]) -> None:
        """A session was handed over to another router: it goes on there, and nobody is told."""
        self._hooks.session_left.append(handler)

    def on_note(self, handler: NoteHandler) -> None:
        """Gets the notes of the same module in other routers."""
        self._hooks.notes[self._spec.name] = handler

    async def ask(self, account: str, content: bytes) -> list[bytes]:
        """Asks the same module in the other routers that may have sessions of an account."""
        return await self.router.ask(self._spec.name, account, content)

    def tell(self, account: str, content: bytes) -> None:
        """Tells them something."""
        self.router.tell(self._spec.name, account, content)

    async def tell_bound(self, account: str, content: bytes) -> None:
        """Tells those that have sessions of the account now."""
        await self.router.tell_bound(self._spec.name, account, content)

    def on_account_deleted(self, handler: AccountHandler) -> None:
        """An account goes: remove what is stored for it. Called when its sessions have ended."""
        self._hooks.account_deleted.append(handler)

    def after(self, iq: Stanza, work: Callable[[], None]) -> None:
        """Does `work` right behind the result that the handler of this request returns."""
        iq.after = work

    def announce_presence(self, session: Session, raw: bytes, type_: str) -> None:
        """For the module that handles presence: tells the others what a session has broadcast."""
        for handler in self._hooks.presence_changed:
            handler(session, raw, type_)

    def announce_directed(self, session: Session, to: str) -> None:
        """For the module that handles presence: a session has sent presence directly to somebody, or has taken it
        back; `to` is '' when from all."""
        for handler in self._hooks.directed_changed:
            handler(session, to)

    async def announce_available(self, session: Session) -> None:
        """For the module that handles presence: tells the others that a session became available.

        What is routed to the session meanwhile is held back and follows in order.
        """
        self.router.hold(session)
        try:
            # Who stores a message from here on knows that somebody has come.
            await self.router.known()
            for handler in self._hooks.session_available:
                result = handler(session)
                if result is not None:
                    await result
        finally:
            self.router.release(session)
