"""The way of a stanza through a router.

From a session: `from_session` numbers it, shows it to the modules that asked for it, and routes it by its
address: the server itself, a local account, a component, or nobody. Where an account's stanza is dealt with,
and which other routers get copies, the strategy says (`tidings.cluster.forwarding`); what its sessions get
follows `delivery`. Forwarding a message builds no tree: only modules that consume a stanza parse it.

Everything is synchronous until a module, the database or another router must be waited for; then what belongs
behind the stanza waits, and nothing overtakes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from services.router.account_delivery import AccountDelivery
from services.router.answers import Answers, Components, Pending
from services.router.deliveries import Deliveries, is_tracked
from services.router.endings import Endings
from services.router.iq_deadlines import REQUESTS
from services.router.notes import Notes
from services.router.passing import Passing
from services.router.sessions import Session, Sessions
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.flows import Waiter
from tidings.cluster.forwarding import Forwarder, Item, Mode, Sent
from tidings.cluster.strategy import HERE, Plan, Strategy
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.link import Lane
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE, PRESENCE, Hooks, Stanza, StanzaHandler, Where
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid, JidError

if TYPE_CHECKING:
    from services.router.connector_link import ConnectorLink
    from services.router.forward_links import ForwardLinks
    from services.router.orphans import Orphans
    from services.router.safety import Safety
    from services.router.store import AccountStore, SessionTable

log = get_logger("router")

_step: ContextVar[Lane] = ContextVar("step")

# RFC 6121 4.7.1; presence without a type is available.
PRESENCE_TYPES = frozenset(
    ("", "unavailable", "subscribe", "subscribed", "unsubscribe", "unsubscribed", "probe", "error")
)


class Routing:
    """Routes stanzas. One for each router."""

    def __init__(
        self,
        hosts: frozenset[str],
        sessions: Sessions,
        hooks: Hooks,
        accounts: AccountStore,
        components: Components,
        table: SessionTable,
        safety: Safety,
        links: ForwardLinks,
        own: str,
        newer_view: Callable[[float], Awaitable[bool]],
        spawn: Callable[[Any, str], Any],
    ) -> None:
        """`own`: this router's incarnation. `newer_view`: waits so many seconds for the view to change."""
        self.hosts = hosts
        self._sessions = sessions
        self._hooks = hooks
        self._components = components
        self.safety = safety
        self._links = links
        self._spawn = spawn
        self.deliveries = Deliveries(sessions)
        safety.offers.spawn = spawn
        self.deliveries.on_again = lambda session, id_: safety.acknowledged(session, [id_])
        self.endings = Endings(hooks, self.step, spawn)
        self.notes = Notes(own, hooks, table, self.step)
        # Looks after sessions of dead routers; it needs this routing itself, so it comes behind it.
        self.orphans: Orphans | None = None
        self.forwarder: Forwarder = None  # type: ignore[assignment] # made by `start`
        self.strategy: Strategy = None  # type: ignore[assignment]
        self.answers = Answers(
            sessions, hooks, components, self.deliveries, self.step, safety.sender, self._reply_elsewhere
        )
        self._at_account = AccountDelivery(
            own, sessions, hooks, accounts, table, safety, self.deliveries, self.answers,
            Passing(sessions, spawn), newer_view,
        )  # fmt: skip
        # Told of what a session answers to the server.
        self.on_answer: Callable[[Session, Envelope], object] = lambda _session, _envelope: None
        # By account and router: sessions that were taken over from there, each with what is set when that is settled.
        self._unsettled: dict[tuple[str, str], list[asyncio.Event]] = {}
        # Links of connectors that are out of reach; and what ends those sessions of an account that others have.
        self.cut: Collection[ConnectorLink | None] = ()
        self.check: Callable[[str], Awaitable[None]] = _nothing
        # For metrics.
        self.received = 0

    def start(self, strategy: Strategy, forwarder: Forwarder) -> None:
        """The two need this routing themselves, so they come behind it."""
        self.strategy = strategy
        self.forwarder = forwarder
        self.notes.start(strategy, forwarder)
        self._at_account.start(strategy, forwarder)

    def settle_by(self, orphans: Orphans) -> None:
        self.orphans = orphans
        self._at_account.is_settled = orphans.is_settled

    def view_changed(self, view: ClusterView) -> None:
        self._at_account.view_changed(view)

    # --- what modules send while they handle something ---

    @asynccontextmanager
    async def step(self) -> AsyncIterator[None]:
        """What is sent within goes out in order, and has arrived when the step ends: so a session's later
        stanzas overtake nothing that an earlier one set in motion."""
        lane = Lane(self._spawn)
        token = _step.set(lane)
        try:
            yield
        finally:
            _step.reset(token)
            await lane.idle()

    def send_for_module(self, envelope: Envelope) -> None:
        """Sends a stanza for a module, within the step that it handles, if any."""
        (_step.get(None) or Lane(self._spawn)).run(self.route, envelope)

    # --- in ---

    def from_session(self, session: Session, envelope: Envelope) -> Pending:
        """Takes a stanza that a session sent, and that safety has accepted; `from_jid` is the session's full JID."""
        pending = self._from_session(session, envelope)
        if pending is not None:
            return self._dealt_later(pending, session, envelope.number)
        self.safety.dealt(session, envelope.number)
        relief = self.safety.relief(session) if envelope.kind == MESSAGE else None
        if relief is not None:
            session.lane.press()
        return relief

    async def _dealt_later(self, pending: Awaitable[None], session: Session, number: int) -> None:
        try:
            await pending
        finally:
            self.safety.dealt(session, number)

    def _from_session(self, session: Session, envelope: Envelope) -> Pending:
        kind = envelope.kind
        if kind != MESSAGE and self._sessions.get(session.id) is not session:
            return None  # it has ended meanwhile: nobody is to see it available, or to answer it
        self.received += 1
        try:
            to = self._in_order(envelope, kind, session)
            if to is None:
                return None
        except (StanzaError, JidError) as error:
            self.answers.refuse(envelope, error, session)
            return None
        try:
            if kind == MESSAGE:
                self.safety.sent(session, envelope, to)
                if session.withheld is not None and session.withheld.refused(envelope.to_jid):
                    raise StanzaError(
                        "resource-constraint", "what was sent there before could not be stored", type="wait"
                    )
            handlers = self._hooks.sent.get(kind)
            if handlers is not None:
                # Only kinds that a module watches are wrapped: messages mostly are not.
                stanza = Stanza(envelope, session)
                rest = self._offer(handlers, stanza, 0)
                if rest is not True:
                    return None if rest is False else self._finish(rest, stanza, to, session)
            return self._by_address(envelope, to, session)
        except (StanzaError, JidError) as error:
            self.answers.refuse(envelope, error)
            return None
        except Exception:
            self.answers.failed(envelope)
            return None

    def _in_order(self, envelope: Envelope, kind: int, session: Session) -> Jid | None:
        """Where a stanza that is in order goes; None: it is an IQ request that has had its answer. One to somebody
        else waits for it from here on. Raises StanzaError, JidError."""
        text = envelope.to_jid
        if text:
            to = Jid.parse(text)
            if text != str(to):
                envelope.to_jid = str(to)
        else:
            to = session.jid.bare
        if kind != MESSAGE:
            _check(envelope)
            if kind == IQ and envelope.type in REQUESTS and is_tracked(envelope.to_jid, session):
                return to if self.deliveries.deadlines.asked(session, envelope) else None
        return to

    def route(self, envelope: Envelope) -> Pending:
        """Takes a stanza from a module, a component or another router."""
        try:
            return self._by_address(envelope, Jid.parse(envelope.to_jid), None)
        except (StanzaError, JidError) as error:
            self.answers.refuse(envelope, error)
            return None
        except Exception:
            self.answers.failed(envelope)
            return None

    async def _finish(self, rest: Awaitable[bool], stanza: Stanza, to: Jid, session: Session) -> None:
        """Goes on with a stanza after the modules that had to wait."""
        envelope = stanza.envelope
        try:
            async with self.step():
                go_on = await rest
            if go_on and (envelope.kind == MESSAGE or self._sessions.get(session.id) is session):
                pending = self._by_address(envelope, to, session)
                if pending is not None:
                    await pending
        except (StanzaError, JidError, DatabaseAway) as error:
            self.answers.refuse(envelope, error)
        except Exception:
            self.answers.failed(envelope)

    def _offer(
        self, handlers: list[tuple[frozenset[str], StanzaHandler]], stanza: Stanza, start: int
    ) -> bool | Awaitable[bool]:
        """Shows a stanza to handlers; True when none consumed it. An awaitable of that when one waits."""
        for index in range(start, len(handlers)):
            children, handler = handlers[index]
            if children and children.isdisjoint(stanza.children):
                continue
            consumed = handler(stanza)
            if consumed is True:
                return False
            if consumed is not False:
                return self._offer_rest(consumed, handlers, stanza, index + 1)
        return True

    async def _offer_rest(
        self,
        waiting: Awaitable[bool],
        handlers: list[tuple[frozenset[str], StanzaHandler]],
        stanza: Stanza,
        start: int,
    ) -> bool:
        if await waiting:
            return False
        rest = self._offer(handlers, stanza, start)
        return rest if isinstance(rest, bool) else await rest

    # --- by address ---

    def _by_address(self, envelope: Envelope, to: Jid, session: Session | None) -> Pending:
        """Raises StanzaError."""
        if to.domain in self.hosts:
            if to.local:
                return self._to_account(envelope, to, session)
            return self._to_server(envelope, to, session)
        if self._components.send(to.domain, envelope):
            return None
        # RFC 6120 10.4: no way to that domain (federation is not there yet).
        raise StanzaError("remote-server-not-found")

    def _to_server(self, envelope: Envelope, to: Jid, session: Session | None) -> Pending:
        """RFC 6120 10.3, 10.5.1: stanzas for the server itself."""
        if envelope.kind == IQ:
            if envelope.type in REQUESTS:
                return self.answers.request(envelope, Where.SERVER, session)
            if session is not None:
                self.on_answer(session, envelope)
            return None
        if envelope.kind == MESSAGE and envelope.type not in ("error", "headline"):
            raise StanzaError("service-unavailable")
        return None

    def _to_account(
        self, envelope: Envelope, to: Jid, session: Session | None, waiter: Waiter | None = None
    ) -> Pending:
        account = to.bare_text
        sender = session.account if session is not None else envelope.from_jid.partition("/")[0]
        flow = (sender, account)
        kind = envelope.kind
        if to.resource and kind not in self._hooks.received and self.forwarder.is_here(flow, account, to.resource):
            # What most stanzas are: for a session that is here.
            match = self._sessions.of(account).get(to.resource)
            if match is not None and not (self.cut and (match.link or match.holder) in self.cut):
                self._at_account.give(match, envelope, alone=True)
                return None
        if session is not None and account == session.account and kind == IQ and not to.resource:
            # The session's own roster and the like are dealt with where the session is, also while it is not at its
            # home: only there modules see whose it is.
            return self.decide(Item(flow, account, "", envelope, origin=session), HERE)
        if waiter is not None:
            waiter.expect()
        elif kind == MESSAGE:
            waiter = self.safety.waiter(envelope)
        item = Item(flow, account, to.resource, envelope, origin=session, waiter=waiter)
        pending: Pending = self.forwarder.run(item)
        if pending is not None and (
            session is not None if kind == MESSAGE else not self._at_account.is_settled(account)
        ):
            # It is being stored, or waits for a session whose router has died: that holds up nothing but what its
            # sender sends to the same account.
            self.forwarder.hold(item, pending)
            pending = None
        elif pending is not None and waiter is not None:
            return self._dealt_with(pending, item)
        if pending is None and session is not None and len(self.forwarder) and self.forwarder.long(flow):
            return self._relief(flow)
        return pending

    async def _dealt_with(self, pending: Awaitable[None], item: Item) -> None:
        try:
            await pending
        finally:
            self.forwarder.dealt(item)

    async def _relief(self, flow: tuple[str, str]) -> None:
        """Holds a sender up until what it has sent to an account is on its way."""
        relieved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.forwarder.on_relief(flow, partial(_settle, relieved))
        await relieved

    # --- the port of the forwarder ---

    def send(self, node: str, item: Item, sent: Sent, refusals_seen: int) -> None:
        self._links.send(node, item, sent, refusals_seen)

    def crowded(self, plan: Plan) -> bool:
        return self._links.crowded(plan)

    def decide(self, item: Item, plan: Plan) -> Pending:
        """Applies the rules of an account to a stanza for it."""
        envelope: Envelope = item.payload
        if item.mode is Mode.NOTE:
            return self.notes.noted(item)
        if self.cut and not item.checked and self._may_be_elsewhere(item.account):
            item.checked = True
            return self._decide_behind(self.check(item.account), item, plan)
        if self._unsettled and item.source:
            settled = self._unsettled.get((item.account, item.source))
            if settled is not None:
                return self._decide_behind(settled[-1].wait(), item, plan)
        if item.mode is Mode.SESSIONS:
            item.taken = self._at_account.to_sessions_here(envelope, item)
            return None if item.taken else self._at_account.when_arrived(item)
        try:
            if item.missed:
                return self._at_account.absent(item)
            handlers = self._hooks.received.get(envelope.kind)
            if handlers is not None:
                rest = self._offer(handlers, Stanza(envelope, item.origin), 0)
                if rest is False:
                    return None
                if rest is not True:
                    return self._deliver_after(rest, item, plan)
            return self._at_account.deliver(item, plan)
        except (StanzaError, JidError) as error:
            self.answers.refuse(envelope, error, waiter=item.waiter)
        except Exception:
            self.answers.failed(envelope, item.waiter)
        return None

    def _may_be_elsewhere(self, account: str) -> bool:
        """Whether an account has a session here that others may have taken over: its connector is out of reach."""
        return any((session.link or session.holder) in self.cut for session in self._sessions.of(account).values())

    async def _decide_behind(self, first: Awaitable[object], item: Item, plan: Plan) -> None:
        await first
        pending = self.decide(item, plan)
        if pending is not None:
            await pending

    @contextmanager
    def unsettled(self, account: str, router: str) -> Iterator[None]:
        """A session of an account was taken over from a router that may not know: what comes from there for the
        account waits, for what that one has stored for the session goes first."""
        settled = asyncio.Event()
        waiting = self._unsettled.setdefault((account, router), [])
        waiting.append(settled)
        try:
            yield
        finally:
            waiting.remove(settled)
            if not waiting:
                del self._unsettled[account, router]
            settled.set()

    def is_unsettled(self, account: str, router: str) -> bool:
        return (account, router) in self._unsettled

    def wait(self, pending: Awaitable[None], then: Callable[[], None]) -> None:
        async def waiting() -> None:
            try:
                await pending
            finally:
                then()

        self._spawn(waiting(), "stanza from another router")

    def overflowed(self, item: Item) -> None:
        self.answers.refuse(
            item.payload,
            StanzaError("resource-constraint", "too much waits for that account", type="wait"),
            waiter=item.waiter,
        )

    # --- what an account gets ---

    async def _deliver_after(self, rest: Awaitable[bool], item: Item, plan: Plan) -> None:
        envelope = item.payload
        try:
            async with self.step():
                go_on = await rest
            if go_on:
                pending = self._at_account.deliver(item, plan)
                if pending is not None:
                    await pending
        except (StanzaError, JidError, DatabaseAway) as error:
            self.answers.refuse(envelope, error, waiter=item.waiter)
        except Exception:
            self.answers.failed(envelope, item.waiter)

    def _reply_elsewhere(self, reply: Envelope, to: Jid, waiter: Waiter | None) -> None:
        """An answer for somebody who has no session here; `waiter`: waits until it is there."""
        if to.domain not in self.hosts:
            self._components.send(to.domain, reply)
        elif self._at_account.others and to.local:
            # An answer is never refused, so nothing comes of waiting for it.
            pending = self._to_account(reply, to, None, waiter)
            if pending is not None:
                self._spawn(pending, "answer to another router")


def _check(envelope: Envelope) -> None:
    """RFC 6120 8.2.3 for IQs and RFC 6121 4.7.1 for presence."""
    if envelope.kind == IQ:
        if not envelope.id:
            raise StanzaError("bad-request", "an IQ needs an id")
        if envelope.type in REQUESTS:
            if len(envelope.children) != 1:
                raise StanzaError("bad-request", "an IQ request has exactly one child")
        elif envelope.type not in ("result", "error"):
            raise StanzaError("bad-request", "an IQ is of type get, set, result or error")
    elif envelope.kind == PRESENCE and envelope.type not in PRESENCE_TYPES:
        raise StanzaError("bad-request", f"no such type of presence: {envelope.type[:40]}")


def _settle(relieved: asyncio.Future[None]) -> None:
    if not relieved.done():
        relieved.set_result(None)


async def _nothing(_account: str) -> None: ...
