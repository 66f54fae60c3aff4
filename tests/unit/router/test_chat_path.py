"""The way of a chat message through the router builds no tree (issue 3: no stanza does on the chat path)."""

from __future__ import annotations

from typing import Any

import pytest

from services.router import component_links, delivery, routing, sessions
from services.router.app import StrategyContext
from services.router.archive_rules import ArchiveRules
from services.router.messages import Done, Message
from services.router.messages_memory import MemoryMessageStore
from services.router.rosters import Rosters
from services.router.routing import Routing
from services.router.safety import Safety
from services.router.sessions import Session, Sessions
from services.router.store_memory import MemoryAccountStore, MemoryRosterStore, MemorySessionTable
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.cluster.forwarding import Forwarder
from tidings.cluster.strategies.home import Home
from tidings.kit import module as module_kit
from tidings.kit.module import MESSAGE, Hooks
from tidings.xmpp import stanza
from tidings.xmpp.jid import Jid


class Link:
    """Takes what is written to sessions."""

    incarnation = "c1"

    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []

    def deliver(self, session: Session, envelope: Envelope, number: int) -> None:
        self.written.append((str(session.jid), envelope.stanza))


class Messages(MemoryMessageStore):
    """Notes for whom is written, and whether it waits for somebody."""

    def __init__(self, table: MemorySessionTable) -> None:
        super().__init__(table)
        self.written: list[tuple[str, bool]] = []

    def write(self, message: Message, done: Done) -> None:
        self.written.append((str(message.account), message.pending))


async def no_newer_view(_timeout: float) -> bool:
    return False


def test_a_chat_message_passes_without_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tree(*_: object) -> None:
        raise AssertionError("a tree was built")

    for module in (stanza, module_kit, routing, delivery, sessions, component_links):
        if hasattr(module, "to_tree"):
            monkeypatch.setattr(module, "to_tree", no_tree)
    link = Link()
    known = Sessions()
    hosts = frozenset({"example.org"})

    def spawn(*_: object) -> None:
        raise AssertionError("something had to be waited for")

    components = component_links.ComponentLinks(hosts, lambda _: ())
    links: Any = None  # there is no other router
    table = MemorySessionTable()
    messages = Messages(table)
    rules = ArchiveRules(messages, Rosters(MemoryRosterStore()), lambda _host: True, hosts)
    safety = Safety(known, messages, "database", 0, rules)
    safety.start(b"k" * 32)
    routes = Routing(
        hosts,
        known,
        Hooks(),
        MemoryAccountStore(),
        components,
        table,
        safety,
        links,
        "r1",
        no_newer_view,
        spawn,
    )
    strategy = Home("r1", StrategyContext(routes, known))
    routes.start(strategy, Forwarder(strategy, routes))
    romeo, juliet = (
        Session(Jid.parse(f"{name}@example.org/r"), "en", link, number, spawn)  # type: ignore[arg-type]
        for number, name in enumerate(("romeo", "juliet"))
    )
    for session in (romeo, juliet):
        known.add(session)
    juliet.presence = b"<presence/>"
    raw = b"<message from='romeo@example.org/r' to='juliet@example.org' type='chat'><body>x</body></message>"
    for to in ("juliet@example.org/r", "juliet@example.org"):
        envelope = Envelope(
            kind=MESSAGE, type="chat", from_jid="romeo@example.org/r", to_jid=to, children=["body"], stanza=raw
        )
        assert safety.accept(romeo, envelope)
        assert routes.from_session(romeo, envelope) is None
    assert [jid for jid, _ in link.written] == ["juliet@example.org/r"] * 2
    assert all(stanza.startswith(raw[:-10]) for _, stanza in link.written)
    assert messages.written == [("romeo@example.org", False), ("juliet@example.org", True)] * 2
