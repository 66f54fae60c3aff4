"""What an account gets: RFC 6121 section 8.5 applied to its sessions, here and at other routers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from services.router import delivery
from services.router.answers import Answers, Pending
from services.router.deliveries import Deliveries
from services.router.delivery import Action, Addressed
from services.router.iq_deadlines import REQUESTS
from services.router.messages import CLAIMED
from services.router.passing import Passing, goes_on
from services.router.sessions import Session, Sessions
from services.router.shown import Shown
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.forwarding import Forwarder, Item
from tidings.cluster.node import NodeState
from tidings.cluster.strategy import Plan, Strategy
from tidings.cluster.view import ClusterView
from tidings.kit.db import DatabaseAway
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, MESSAGE, PRESENCE, Hooks, Stanza, Where
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid, JidError

if TYPE_CHECKING:
    from services.router.safety import Safety
    from services.router.store import AccountStore, SessionTable
    from tidings.cluster.flows import Waiter

log = get_logger("router")

# How often an item was missed: nobody took it where the strategy said; nor where the table said.
TABLE_ASKED = 2
# Seconds for a session that the table has at a router which is not in the view: till then that one has come, or
# others have taken it over or ended it (orphans.py); and between two looks.
SETTLED = 7.0
LOOK = 0.25
# Seconds between two tries to find who is to have an answer, while the database is away.
RETRY = 1.0
ANSWERS = ("error", "result")


class AccountDelivery:
    """Gives stanzas to the accounts of which this router decides. One for each router."""

    def __init__(
        self,
        own: str,
        sessions: Sessions,
        hooks: Hooks,
        accounts: AccountStore,
        table: SessionTable,
        safety: Safety,
        deliveries: Deliveries,
        answers: Answers,
        passing: Passing,
        newer_view: Callable[[float], Awaitable[bool]],
    ) -> None:
        self._own = own
        self._sessions = sessions
        self._hooks = hooks
        self._accounts = accounts
        self._table = table
        self._safety = safety
        self._deliveries = deliveries
        self._answers = answers
        self._passing = passing
        self._newer_view = newer_view
        self._shown = Shown()
        self._forwarder: Forwarder = None  # type: ignore[assignment] # made by `start`
        self._strategy: Strategy = None  # type: ignore[assignment]
        # The other routers of the view that may have sessions.
        self.others: frozenset[str] = frozenset()
        # Some router hands its sessions to others.
        self._draining = False
        # False while sessions of an account may be at a router that has died (orphans.py).
        self.is_settled: Callable[[str], bool] = lambda _account: True

    def start(self, strategy: Strategy, forwarder: Forwarder) -> None:
        self._strategy = strategy
        self._forwarder = forwarder

    def view_changed(self, view: ClusterView) -> None:
        nodes = view.with_router_sessions()
        self.others = frozenset(node.incarnation for node in nodes) - {self._own}
        self._draining = any(node.state is NodeState.DRAINING for node in nodes)

    def deliver(self, item: Item, plan: Plan) -> Pending:
        """Gives a stanza to the sessions that are here, and copies to routers that may have others."""
        envelope: Envelope = item.payload
        kind = envelope.kind
        if item.resource:
            if self.to_sessions_here(envelope, item):
                return None
        elif kind == IQ:
            if envelope.type in REQUESTS:
                return self._answers.request(envelope, Where.ACCOUNT, item.origin)
            return None
        else:
            action = delivery.decide(kind, envelope.type, Addressed.BARE_PRESENT)
            if action is Action.BOUNCE:
                raise StanzaError("service-unavailable")
            if action is Action.IGNORE:
                return None
        taken = not item.resource and self.to_sessions_here(envelope, item)
        if item.again and kind == MESSAGE and not item.resource and self._may_have_others(item.account):
            item.again = False
            return self._again(item, plan, taken, self._ids_here(item.account))
        if plan.nodes:
            if item.again and kind == MESSAGE:
                plan = Plan(nodes=plan.nodes, certain=False)  # nothing goes past it before it is known who takes it
            if kind == PRESENCE and not plan.certain and not self._may_move(item.account):
                # Nobody is known to be there, and mostly nobody is: the table is not asked for each of these.
                item.missed = TABLE_ASKED - 1
            self._forwarder.copies(item, plan, taken)
            return None
        return None if taken else self.absent(item)

    def to_sessions_here(self, envelope: Envelope, item: Item) -> bool:
        """RFC 6121 8.5.2.1, 8.5.3.1 for the sessions of this router; whether there were any."""
        sessions = self._sessions.of(item.account)
        if item.resource:
            match = sessions.get(item.resource)
            if match is not None:
                self.give(match, envelope, item.waiter, alone=True)
            return match is not None
        kind = envelope.kind
        present = (
            delivery.non_negative(sessions.values()) if kind == MESSAGE else delivery.available(sessions.values())
        )
        if kind == MESSAGE and present:
            if self._comes_late(envelope, item, present):
                return False
            if len(present) == 1:
                self.give(present[0], envelope, item.waiter)
                return True
            self._give_all(present, envelope, item.waiter)
            return True
        if kind == PRESENCE and present and self._shown.is_late(envelope):
            return True
        for receiver in present:
            self._deliveries.to_session(receiver, envelope)
        return bool(present)

    def _give_all(self, present: Sequence[Session], envelope: Envelope, waiter: Waiter | None) -> None:
        """A message to several sessions of one account."""
        those = [session for session in present if goes_on(session)]
        safe = self._safety.given(envelope, present[0].jid.bare, self._holder(present), waiter, passes=bool(those))
        for receiver in present:
            self._deliveries.to_session(receiver, envelope)
        if safe is not None:
            self._passing.when_all_have_passed(those, safe)

    def when_arrived(self, item: Item) -> Pending:
        """Of an item that no session here has taken: one of them may be arriving. Its router was told that it is."""
        return None if self._sessions.arrival(item.account) is None else self._taken_when_arrived(item)

    async def _taken_when_arrived(self, item: Item) -> None:
        await self._sessions.arrived(item.account, SETTLED)
        item.taken = self.to_sessions_here(item.payload, item)

    @staticmethod
    def _comes_late(envelope: Envelope, item: Item, present: Sequence[Session]) -> bool:
        """Whether a message that was for another resource, which is gone, comes behind later stanzas of its sender:
        one of these sessions would take it for a repeated one. It is stored, and read back there for one of them."""
        if item.resource or "/" not in envelope.to_jid or not envelope.number:
            return False
        return any(envelope.number <= session.taken.get(envelope.origin, 0) for session in present)

    def give(self, session: Session, envelope: Envelope, waiter: Waiter | None = None, alone: bool = False) -> None:
        """To one session, whatever it is (8.5.3.1). `alone`: no other one, here or elsewhere, is given it."""
        if envelope.kind != MESSAGE:
            self._deliveries.to_session(session, envelope)
            return
        copied = self._deliveries.is_copied(session, envelope)
        holder = CLAIMED + session.id if alone else self._holder((session,))
        safe = self._safety.given(envelope, session.jid.bare, holder, waiter, copied, goes_on(session))
        self._deliveries.to_session(session, envelope)
        if safe is not None:
            self._passing.when_passed(session, safe)

    def _holder(self, sessions: Sequence[Session]) -> str:
        """Of those that a message is for, the first one that is given it now; else the one that gets it from the
        store, when it has read what goes before it, and that nobody else has had it."""
        taker = next(filter(self._deliveries.takes, sessions), None)
        return taker.id if taker is not None else CLAIMED + sessions[0].id

    def _may_have_others(self, account: str) -> bool:
        """Whether an account may have sessions at other routers, or at one that is gone."""
        return bool(self.others) or not self.is_settled(account)

    def _may_move(self, account: str) -> bool:
        """Whether sessions of an account may be on their way to another router."""
        return self._draining or bool(self._strategy.keeper(account)) or not self.is_settled(account)

    def absent(self, item: Item) -> Pending:
        """Nobody takes it, as far as the strategy knows. Where other routers are, the table has the last word; for
        presence only when the strategy was wrong, or a router has died: a session may just have moved, or will."""
        guessed = self.others and (item.missed or item.payload.kind != PRESENCE)
        asks = item.missed < TABLE_ASKED and (guessed or not self.is_settled(item.account))
        if item.missed and not (asks and _is_goodbye(item.payload)) and self.to_sessions_here(item.payload, item):
            return None  # it came here while the others were asked
        if asks:
            return self._ask_table(item)
        return self._nobody(item)

    async def _again(self, item: Item, plan: Plan, taken: bool, had: set[str]) -> None:
        """A message comes back from a router that has died. The strategy may not know yet who takes over what was
        there; the table does. What comes behind it must not be there first, though others of the account have it.

        `had`: ids of the sessions that were here when it was given to those.
        """
        try:
            nodes = await self._where(item)
        except DatabaseAway:
            nodes = set(plan.nodes)
        if self._own in nodes:
            await self._sessions.arrived(item.account, SETTLED)
            if self._ids_here(item.account) - had:
                # One has come here meanwhile; those that have it do not get it twice.
                taken = self.to_sessions_here(item.payload, item) or taken
        elsewhere = tuple(sorted(nodes & self.others))
        if elsewhere:
            self._forwarder.copies(item, Plan(nodes=elsewhere, certain=False), taken)
        elif not taken and not item.takers:
            await self._ask_table(item)

    def _ids_here(self, account: str) -> set[str]:
        return {session.id for session in self._sessions.of(account).values()}

    async def _where(self, item: Item) -> set[str]:
        """The routers that have sessions which an item may be for. Raises DatabaseAway."""
        nodes = await self._by_table_in_time(item)
        loop = asyncio.get_running_loop()
        ends = loop.time() + SETTLED
        while nodes - self.others - {self._own} and loop.time() < ends:
            # A router that has only just come; or one that is gone: its sessions are taken over, or ended.
            await self._newer_view(LOOK)
            nodes = await self._by_table_in_time(item)
        return nodes

    async def _ask_table(self, item: Item) -> None:
        try:
            nodes = await self._where(item)
            if item.payload.kind == MESSAGE and await self._safety.safe_elsewhere(item.flow):
                nodes = await self._where(item)  # somebody may have come, or gone, meanwhile
            if _is_goodbye(item.payload) and await self._is_replaced(item.payload):
                return
            elsewhere = tuple(sorted(nodes & self.others))
            if elsewhere and item.payload.kind == MESSAGE:
                await self._safety.offered(Jid.parse(item.account))
            elif not elsewhere and self._own in nodes:
                await self._sessions.arrived(item.account, SETTLED)
            if self._forwarder.gives_way(item):
                return  # a router has died meanwhile that had taken what was sent before
            if elsewhere:
                log.debug("found_by_table", account=item.account, routers=elsewhere)
                item.missed = TABLE_ASKED
                self._forwarder.copies(item, Plan(nodes=elsewhere, certain=False), False)
                return
            if self._own in nodes and self.to_sessions_here(item.payload, item):
                return
            pending = self._nobody(item)
            if pending is not None:
                await pending
        except (StanzaError, JidError, DatabaseAway) as error:
            if item.payload.kind != PRESENCE:
                self._answers.refuse(item.payload, error, waiter=item.waiter)
        except Exception:
            self._answers.failed(item.payload, item.waiter)

    async def _is_replaced(self, envelope: Envelope) -> bool:
        """Whether a session that has ended has a successor, which contacts may have seen by now: it was to be seen
        before that one, but the router of who sees it has died."""
        rows = await self._table.of_account(Jid.parse(envelope.from_jid).bare)
        return any(
            row.available and row.session != envelope.origin for row in rows if str(row.jid) == envelope.from_jid
        )

    async def _by_table_in_time(self, item: Item) -> set[str]:
        """The same; but nobody can be told that an answer does not arrive: it waits for the database. Raises
        DatabaseAway."""
        while True:
            try:
                return await self._by_table(item)
            except DatabaseAway:
                if item.payload.type not in ANSWERS:
                    raise
                await asyncio.sleep(RETRY)

    async def _by_table(self, item: Item) -> set[str]:
        rows = await self._table.of_account(Jid.parse(item.account))
        return {row.router for row in rows if not item.resource or row.jid.resource == item.resource}

    def _nobody(self, item: Item) -> Pending:
        """RFC 6121 8.5.2.2 and 8.5.3.2: there is no session for it."""
        envelope: Envelope = item.payload
        kind = envelope.kind
        if item.resource and kind == MESSAGE:
            if delivery.decide(kind, envelope.type, Addressed.FULL_PRESENT) is Action.NON_NEGATIVE:
                # 8.5.3.2.1: as if it had been addressed to the bare JID.
                item.resource = ""
                item.missed = 0
                return self.deliver(item, self._strategy.locate(item.account, ""))
        addressed = Addressed.FULL_ABSENT if item.resource else Addressed.BARE_ABSENT
        action = delivery.decide(kind, envelope.type, addressed)
        if action is Action.STORE:
            return self._store(item, Jid.parse(item.account))
        if action is Action.BOUNCE:
            raise StanzaError("service-unavailable")
        return None

    async def _store(self, item: Item, account: Jid) -> None:
        envelope, waiter = item.payload, item.waiter
        try:
            if await self._accounts.exists(account.domain, account.local):
                for handler in self._hooks.undelivered:
                    kept = handler(Stanza(envelope))
                    if kept is True or (kept is not False and await kept):
                        return
            self._answers.refuse(envelope, StanzaError("service-unavailable"), waiter=waiter)
        except (StanzaError, DatabaseAway) as error:
            self._answers.refuse(envelope, error, waiter=waiter)
        except Exception:
            self._answers.failed(envelope, waiter)


def _is_goodbye(envelope: Envelope) -> bool:
    """Whether it says that a session, `origin`, is seen no more."""
    return envelope.kind == PRESENCE and envelope.type == "unavailable" and bool(envelope.origin)
