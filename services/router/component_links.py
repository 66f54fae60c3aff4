"""Components (component.v1): who is attached, which stanzas are theirs, and what they may send."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grpc

from services.router.messages import id_text
from services.router.store import AccountStore, RosterStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.stanza_pb2 import Envelope, Feed
from tidings.api.component.v1 import component_pb2 as pb
from tidings.api.component.v1.component_pb2_grpc import ComponentServiceServicer
from tidings.cluster.hashing import rendezvous
from tidings.kit.db import DatabaseAway
from tidings.kit.grpc_server import current_caller
from tidings.kit.link import INTERVAL, LAST_WRITE, Lane, Outbox, Overflow
from tidings.kit.logging import get_logger
from tidings.kit.module import KINDS, PRESENCE, Module, ModuleSpec, Session
from tidings.kit.rpc_errors import TidingsError
from tidings.kit.tasks import Tasks
from tidings.xmpp.errors import StreamError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.parser import parse_stanza

if TYPE_CHECKING:
    from services.router.routing import Routing

log = get_logger("component")

VHOST = "{vhost}"
# Every domain that is neither a virtual host nor another component's.
DEFAULT_ROUTE = "*"
MAX_INSTANCE = 64
# How --component-allow calls the feeds.
FEEDS = {Feed.FEED_PRESENCE: "feed:presence", Feed.FEED_SESSION_END: "feed:session-end"}
# Requests at accounts that a component may have open; of more, the answers to the oldest are dropped. It stops a
# component that answers nothing from filling memory.
MAX_ASKED = 10_000
# Senders in components' domains whose names as origins are remembered; others' are made again.
MAX_ORIGINS = 10_000
# Accounts share so many lanes for what one component sends.
LANES = 64


@dataclass(slots=True, eq=False)
class ComponentLink:
    """One attached instance of a component."""

    name: str
    instance: str
    outbox: Outbox[pb.AttachResponse]
    registration: pb.Registration
    # As they are now, `{vhost}` written out.
    domains: tuple[str, ...] = ()
    assigned: set[str] = field(default_factory=set)
    # Names what it sends, with the number of its last stanza: what is attached anew counts anew.
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    number: int = 0

    # The call that is being handled.
    handling: asyncio.Task[None] | None = None

    def send(self, envelope: Envelope) -> None:
        try:
            self.outbox.begin(len(envelope.stanza)).append(envelope)
        except Overflow:
            if self.handling is not None and not self.handling.cancelling():
                log.error("link_cut_off", peer=f"component {self.name}", reason="it does not take what it is sent")
                self.handling.cancel()


class ComponentLinks:
    """All components of this router: satisfies `services.router.routing.Components`."""

    def __init__(self, hosts: frozenset[str], allowed: Callable[[str], Iterable[str]]) -> None:
        self._hosts = hosts
        # What a component of a given name may register (--component-allow).
        self._allowed = allowed
        # By domain; all links of a domain have one name.
        self._by_domain: dict[str, list[ComponentLink]] = {}
        self._by_namespace: dict[str, list[ComponentLink]] = {}
        self._by_feed: dict[int, list[ComponentLink]] = {}
        # By component: its open requests at accounts, as account, who asks, and id, the oldest first.
        self._asked: dict[str, dict[tuple[str, str, str], bool]] = {}
        # The feeds are made with what every module has.
        self.module = ModuleSpec("component_feeds", self._watch)

    # --- who is there ---

    def add(self, link: ComponentLink) -> None:
        """Takes a component in. Raises TidingsError when it registers what it may not."""
        registration = link.registration
        if not 1 <= len(registration.instance) <= MAX_INSTANCE or not registration.instance.isprintable():
            raise _bad("`instance` must be 1 to 64 printable characters")
        if not registration.routing_key:
            raise _bad("`routing_key` must be set")
        if not registration.domains and not registration.account_namespaces:
            raise _bad("a component registers at least one domain or namespace")
        if not FEEDS.keys() >= set(registration.feeds):
            raise _bad("there is no such feed")
        allowed = set(self._allowed(link.name))
        for wanted in (
            *registration.domains,
            *(f"account:{namespace}" for namespace in registration.account_namespaces),
            *(FEEDS[feed] for feed in registration.feeds),
        ):
            if wanted not in allowed:
                raise TidingsError(
                    ErrorReason.ERROR_REASON_NOT_ALLOWED,
                    f"the component {link.name!r} may not register {wanted!r}; the router's option "
                    f"--component-allow[{link.name}]={wanted} would allow it",
                    wanted=wanted,
                )
        domains = [domain for pattern in registration.domains for domain in self._written_out(pattern)]
        for domain in domains:
            others = self._by_domain.get(domain, [])
            if domain in self._hosts or any(other.name != link.name for other in others):
                raise TidingsError(
                    ErrorReason.ERROR_REASON_DOMAIN_TAKEN,
                    f"{domain} is a virtual host or another component's",
                    domain=domain,
                )
        link.domains = tuple(domains)
        for domain in domains:
            self._by_domain.setdefault(domain, []).append(link)
        for namespace in registration.account_namespaces:
            self._by_namespace.setdefault(namespace, []).append(link)
        for feed in registration.feeds:
            self._by_feed.setdefault(feed, []).append(link)
        log.info("component_attached", component=link.name, instance=link.instance, domains=domains)

    def remove(self, link: ComponentLink) -> None:
        indexes: tuple[dict[Any, list[ComponentLink]], ...] = (self._by_domain, self._by_namespace, self._by_feed)
        for index in indexes:
            for key, links in list(index.items()):
                if link in links:
                    links.remove(link)
                    if not links:
                        del index[key]
        log.info("component_detached", component=link.name, instance=link.instance)

    def _written_out(self, pattern: str) -> list[str]:
        if pattern == DEFAULT_ROUTE:
            return [DEFAULT_ROUTE]
        names = [pattern.replace(VHOST, host) for host in sorted(self._hosts)] if VHOST in pattern else [pattern]
        try:
            return [Jid.parse(name).domain for name in names]
        except JidError as error:
            raise _bad(f"{pattern!r} is no domain: {error}") from None

    def titles(self) -> Mapping[str, str]:
        """The domains that are served now, with their titles."""
        return {
            domain: links[0].registration.title
            for domain, links in sorted(self._by_domain.items())
            if domain != DEFAULT_ROUTE
        }

    # --- to components ---

    def send(self, domain: str, envelope: Envelope) -> bool:
        links = self._by_domain.get(domain) or self._by_domain.get(DEFAULT_ROUTE)
        if not links:
            return False
        self._pick(links, envelope.to_jid).send(envelope)
        return True

    def send_for_account(self, envelope: Envelope) -> bool:
        namespace = envelope.children[0].partition("}")[0].lstrip("{")
        links = self._by_namespace.get(namespace)
        if not links:
            return False
        if not envelope.to_jid:
            # RFC 6120 10.3.3: without `to` it is for the sender's own account.
            envelope.to_jid = str(Jid.parse(envelope.from_jid).bare)
        link = self._pick(links, envelope.to_jid)
        asked = self._asked.setdefault(link.name, {})
        asked[envelope.to_jid, envelope.from_jid, envelope.id] = True
        if len(asked) > MAX_ASKED:
            del asked[next(iter(asked))]
        link.send(envelope)
        return True

    def serves_accounts(self, name: str) -> bool:
        """Whether a component of this name is attached that serves a namespace at accounts."""
        return any(link.name == name for links in self._by_namespace.values() for link in links)

    def _pick(self, links: list[ComponentLink], to_jid: str) -> ComponentLink:
        if len(links) == 1:
            return links[0]
        to = Jid.parse(to_jid)
        bare = str(to.bare)
        key = links[0].registration.routing_key
        if key == pb.RoutingKey.ROUTING_KEY_ASSIGNED:
            for link in links:
                if bare in link.assigned:
                    return link
        by_instance = {link.instance: link for link in links}
        text = to.domain if key == pb.RoutingKey.ROUTING_KEY_DOMAIN_TO else bare
        return by_instance[rendezvous(text, sorted(by_instance))]

    # --- feeds ---

    def _watch(self, module: Module) -> None:
        """Registers what the feeds are made of."""
        module.on_presence_changed(self._presence)
        module.on_session_ended(self._session_end)

    def _presence(self, session: Session, raw: bytes, type_: str) -> None:
        links = self._by_feed.get(Feed.FEED_PRESENCE)
        if links:
            copy = Envelope(
                origin=session.id, kind=PRESENCE, type=type_, from_jid=str(session.jid), stanza=raw,
                feed=Feed.FEED_PRESENCE,
            )  # fmt: skip
            for link in links:
                link.send(copy)

    def _session_end(self, session: Session, was_available: bool) -> None:
        for link in self._by_feed.get(Feed.FEED_SESSION_END, ()):
            link.send(Envelope(origin=session.id, from_jid=str(session.jid), feed=Feed.FEED_SESSION_END))

    # --- from components ---

    def checked(self, link: ComponentLink, envelope: Envelope) -> Envelope | None:
        """What a component sent, with the routing fields of its bytes; None for what nobody waits for. Raises
        TidingsError."""
        try:
            element = parse_stanza(envelope.stanza)
            sender, to = Jid.parse(element.attrs.get("from", "")), Jid.parse(element.attrs.get("to", ""))
        except StreamError as error:
            raise _bad(f"`stanza` must be one self-contained stanza: {error}") from None
        except JidError:
            raise _bad("a component's stanzas need `from` and `to`, both JIDs") from None
        if element.name not in KINDS:
            raise _bad(f"{element.name!r} is no stanza")
        foreign = DEFAULT_ROUTE in link.domains and self._foreign(sender.domain)
        if sender.domain not in link.domains and not foreign:
            if sender.domain not in self._hosts or not sender.local or sender.resource:
                raise _bad(f"{sender} lies in none of the component's domains")
            if element.name == "iq" and element.attrs.get("type") in ("result", "error"):
                asked = self._asked.get(link.name, {})
                if not asked.pop((str(sender), str(to), element.attrs.get("id", "")), False):
                    return None
            elif element.name != "message" or not element.children or not self._is_event(link, element.children):
                raise _bad(f"for {sender} the component only answers, and tells of its own namespaces")
        link.number += 1
        return Envelope(
            origin=_origin(link.id, str(sender.bare)), number=link.number, kind=KINDS[element.name],
            type=element.attrs.get("type", ""), id=element.attrs.get("id", ""), from_jid=str(sender), to_jid=str(to),
            children=element.children, stanza=envelope.stanza, received_unix_ms=time.time_ns() // 1_000_000,
        )  # fmt: skip

    def _is_event(self, link: ComponentLink, children: Iterable[str]) -> bool:
        """Whether a message tells of nothing but what the component serves at accounts (PEP). It may come unasked:
        when a contact comes online, also for an account that has been silent since this router's start."""
        own = set(link.registration.account_namespaces)
        return all(child.partition("}")[0].lstrip("{") in own for child in children)

    def _foreign(self, domain: str) -> bool:
        return domain not in self._hosts and domain not in self._by_domain


@lru_cache(maxsize=MAX_ORIGINS)
def _origin(link: str, sender: str) -> str:
    """What one of the component's accounts sends is in order by itself."""
    return id_text(hashlib.blake2b(sender.encode(), digest_size=16, key=link.encode()).digest())


class Lanes:
    """Works off what one component sends: in order for each account, and none waits for what the database has to do
    for another one. When a lane is long, `short` waits till it is empty: then no more is read."""

    def __init__(self, spawn: Callable[[Any, str], Any]) -> None:
        self._lanes = [Lane(spawn) for _ in range(LANES)]
        self._long = 0
        self._short = asyncio.Event()
        self._short.set()
        for lane in self._lanes:
            lane.on_long = self._lengthened
            lane.on_short = self._shortened

    def run(self, step: Callable[[Envelope], Awaitable[None] | None], envelope: Envelope) -> None:
        account = envelope.to_jid.partition("/")[0]
        self._lanes[hash(account) % LANES].run(step, envelope)

    async def short(self) -> None:
        await self._short.wait()

    def _lengthened(self) -> None:
        self._long += 1
        self._short.clear()

    def _shortened(self) -> None:
        self._long -= 1
        if not self._long:
            self._short.set()


class ComponentApi(ComponentServiceServicer):
    """Serves component.v1."""

    def __init__(
        self,
        links: ComponentLinks,
        routing: Routing,
        accounts: AccountStore,
        rosters: RosterStore,
        incarnation: str,
        spawn: Callable[[Any, str], Any],
        ready: Callable[[], bool],
    ) -> None:
        self._ready = ready
        self._links = links
        self._routing = routing
        self._accounts = accounts
        self._rosters = rosters
        self._incarnation = incarnation
        self._spawn = spawn

    async def Attach(  # type: ignore[override] # grpc.aio also takes a coroutine that writes by itself
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> None:
        if not self._ready():
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "the router is starting or stopping")
        caller = current_caller(context)
        first = await context.read()
        if first is grpc.aio.EOF or not first.HasField("registration"):
            raise _bad("the first request must carry `registration`")
        local = caller.kind == "local"
        name = component_name(caller, context)
        outbox: Outbox[pb.AttachResponse] = Outbox(pb.AttachResponse, 0 if local else INTERVAL)
        link = ComponentLink(name, first.registration.instance, outbox, first.registration)
        link.handling = asyncio.current_task()
        self._links.add(link)
        registered = outbox.begin_item().registered
        registered.router_incarnation = self._incarnation
        registered.domains.extend(link.domains)
        registered.virtual_hosts.extend(sorted(self._routing.hosts))
        writers = Tasks()
        writers.spawn(outbox.run(context.write), f"component {name}")
        lanes = Lanes(self._spawn)
        try:
            request = first
            while request is not grpc.aio.EOF:
                outbox.received = request.sequence
                for assignment in request.assignments:
                    (link.assigned.add if assignment.taken else link.assigned.discard)(assignment.key)
                for envelope in request.envelopes:
                    checked = self._links.checked(link, envelope)
                    if checked is not None:
                        lanes.run(self._routing.route, checked)
                await lanes.short()
                request = await context.read()
        except Overflow as error:
            log.error("component_does_not_read", component=name, reason=str(error))
        finally:
            self._links.remove(link)
            outbox.end()
            await writers.finish(LAST_WRITE)

    async def GetRosterItem(self, request: pb.GetRosterItemRequest, context: Any) -> pb.GetRosterItemResponse:
        name = component_name(current_caller(context), context)
        if not self._links.serves_accounts(name):
            raise TidingsError(
                ErrorReason.ERROR_REASON_NOT_ALLOWED,
                f"{name!r} is not attached here as a component that serves a namespace at accounts",
            )
        try:
            account, contact = Jid.parse(request.account), Jid.parse(request.contact)
        except JidError as error:
            raise _bad(f"no JID: {error}") from None
        try:
            there = account.domain in self._routing.hosts and await self._accounts.exists(
                account.domain, account.local
            )
            roster = await self._rosters.load(account)
        except DatabaseAway:
            raise TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer") from None
        if not there:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_FOUND, f"there is no account {account.bare}")
        item = roster.items.get(str(contact.bare))
        if item is None:
            return pb.GetRosterItemResponse(subscription="none")
        return pb.GetRosterItemResponse(subscription=item.subscription, groups=item.groups)


def component_name(caller: Any, context: Any) -> str:
    """The name under which a component is known: its service in a node's process, or the client's name."""
    if caller.kind == "client":
        return str(caller.name)
    # Pairs, whatever the release of gRPC makes of them.
    metadata = {pair[0]: pair[1] for pair in tuple(context.invocation_metadata() or ())}
    wanted = str(metadata.get("tidings-service", ""))
    if wanted not in caller.services:
        raise TidingsError(
            ErrorReason.ERROR_REASON_NOT_ALLOWED,
            f"a node names the component service that calls in the metadata `tidings-service`; {wanted!r} is none of "
            f"its services: {', '.join(sorted(caller.services))}",
        )
    return wanted


def _bad(message: str) -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, message)
