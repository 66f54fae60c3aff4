"""A router with an archive in memory, and a client's way to ask for it: for tests of XEP-0313 and XEP-0441."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lxml import etree

from services.router import module_loader
from services.router.archive_rules import ArchiveRules
from services.router.component_links import ComponentLinks
from services.router.messages import Message, MessageStore, id_text
from services.router.messages_memory import MemoryMessageStore
from services.router.modules import xep_0313_mam, xep_0441_mam_prefs
from services.router.sessions import Session
from tests.unit.router.memory_router import HOST, MemoryRouter
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit import options
from tidings.kit.metrics import Metrics
from tidings.kit.module import IQ, MESSAGE
from tidings.xmpp import ns
from tidings.xmpp.jid import Jid

JULIET = Jid.parse(f"juliet@{HOST}")
ROMEO = f"romeo@{HOST}/orchard"


class ArchiveRouter(MemoryRouter):
    def __init__(self, *settings: str) -> None:
        super().__init__()
        self.archive = MemoryMessageStore(self.stores.table)
        components = ComponentLinks(frozenset(), lambda _name: ())
        rules = ArchiveRules(self.archive, self.rosters, lambda _host: True, [HOST])
        ports: dict[Any, Any] = {MessageStore: self.archive, ArchiveRules: rules}
        negotiator: Any = None
        self.for_modules = module_loader.RouterForModules(
            self.routing, self.sessions, self.stores.accounts, components, ports, negotiator, self.tasks.spawn
        )
        given = options.load([f"--virt-hosts={HOST}", *settings], {})
        modules = [xep_0313_mam.MODULE, xep_0441_mam_prefs.MODULE]
        module_loader.load(modules, self.hooks, self.for_modules, given, Metrics())

    async def archived(
        self, number: int, peer: str = ROMEO, *, at: int = 0, body: str = "", archived: bool = True
    ) -> str:
        """Writes juliet's message of a number, from `peer`; its id in the archive."""
        raw = (
            f"<message from='{peer}' to='{JULIET}' type='chat' id='{number}'><body>{body or number}</body></message>"
        )
        id_ = number.to_bytes(16, "big")
        await self.archive.keep(
            Message(
                JULIET,
                id_,
                peer,
                "s",
                number,
                peer,
                at or number,
                raw.encode(),
                pending=not archived,
                archived=archived,
            )
        )
        return id_text(id_)

    async def ask(self, session: Session, type_: str, payload: str, to: str = "") -> list[etree._Element]:
        """Sends a request as a client; what came of it, the answer last."""
        before = len(self.link.of(session))
        tree = etree.fromstring(payload)
        raw = f"<iq type='{type_}' id='q1'>{payload}</iq>".encode()
        await self.send(
            session, Envelope(kind=IQ, type=type_, id="q1", to_jid=to, children=[str(tree.tag)], stanza=raw)
        )
        got = self.link.of(session)[before:]
        assert [envelope.kind for envelope in got] == [MESSAGE] * (len(got) - 1) + [IQ]
        return [etree.fromstring(b"<s xmlns='jabber:client'>" + envelope.stanza + b"</s>")[0] for envelope in got]


def query(*fields: tuple[str, str], page: str = "", attributes: str = "", form_type: str = ns.MAM) -> str:
    """The payload of a query, with a form where there are fields, and the content of a <set/>."""
    form = (
        f"<x xmlns='{ns.DATA_FORMS}' type='submit'>{_fields((('FORM_TYPE', form_type), *fields))}</x>"
        if fields
        else ""
    )
    wanted = f"<set xmlns='{ns.RSM}'>{page}</set>" if page else ""
    return f"<query xmlns='{ns.MAM}'{attributes}>{form}{wanted}</query>"


def _fields(fields: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<field var='{name}'><value>{value}</value></field>" for name, value in fields)


def condition(answer: etree._Element) -> str:
    """Of an error: type and condition."""
    error = answer.find("{*}error")
    assert answer.get("type") == "error", etree.tostring(answer)
    assert error is not None
    return f"{error.get('type')} {etree.QName(error[0]).localname}"
