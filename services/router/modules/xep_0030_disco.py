"""XEP-0030: Service Discovery, of the server and of accounts."""

from __future__ import annotations

from services.router.rosters import Rosters
from services.router.subscription import sees_us
from tidings.kit.module import Module, ModuleSpec, Stanza, Where
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.jid import Jid
from tidings.xmpp.stanza import attribute, quoteattr


def load(module: Module) -> None:
    disco = _Disco(module)
    for namespace in (ns.DISCO_INFO, ns.DISCO_ITEMS):
        module.feature(namespace, Where.SERVER, Where.ACCOUNT)
    module.account_identity("account", "registered")
    info, items = f"{{{ns.DISCO_INFO}}}query", f"{{{ns.DISCO_ITEMS}}}query"
    module.on_iq(info, disco.server_info, types=("get",))
    module.on_iq(items, disco.server_items, types=("get",))
    module.on_iq(info, disco.account_info, types=("get",), where=(Where.ACCOUNT,))
    module.on_iq(items, disco.account_items, types=("get",), where=(Where.ACCOUNT,))
    module.on_note(disco.noted)


MODULE = ModuleSpec("disco", load, xep="XEP-0030", version="2.5rc3", needs=("roster",))


class _Disco:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._rosters = module.router.store(Rosters)

    def server_info(self, iq: Stanza) -> bytes:
        _no_node(iq)
        return _info([("server", "im", "Tidings")], self._module.announced(Where.SERVER))

    def server_items(self, iq: Stanza) -> bytes:
        _no_node(iq)
        host = iq.to.domain
        # Of the components, those of this virtual host.
        listed = "".join(
            f"<item jid={quoteattr(domain)}{attribute('name', title)}/>"
            for domain, title in self._module.router.components().items()
            if domain.endswith(f".{host}")
        )
        return f"<query xmlns='{ns.DISCO_ITEMS}'>{listed}</query>".encode()

    async def account_info(self, iq: Stanza) -> bytes:
        await self._check_may_ask(iq)
        _no_node(iq)
        return _info(self._module.account_identities(), self._module.announced(Where.ACCOUNT))

    async def account_items(self, iq: Stanza) -> bytes:
        """Section 4.1 with RFC 6121 8.5: an account's items are the sessions that the asker may see."""
        await self._check_may_ask(iq)
        _no_node(iq)
        account = str(iq.to.bare)
        listed = b"".join((self._listed(account), *await self._module.ask(account, b"")))
        return b"<query xmlns='%b'>%b</query>" % (ns.DISCO_ITEMS.encode(), listed)

    def noted(self, account: Jid, _note: bytes) -> bytes:
        return self._listed(str(account))

    def _listed(self, account: str) -> bytes:
        """The items of the sessions here."""
        return "".join(
            f"<item jid={quoteattr(str(session.jid))}/>"
            for session in self._module.router.sessions(account).values()
            if session.presence is not None
        ).encode()

    async def _check_may_ask(self, iq: Stanza) -> None:
        """Section 8: strangers learn nothing, not even whether the account exists."""
        account, asker = iq.to.bare, iq.from_.bare
        if asker == account:
            return
        roster = await self._rosters.of(account, self._module.router)
        item = roster.items.get(str(asker))
        if item is None or not sees_us(item.subscription):
            raise StanzaError("service-unavailable")


def _no_node(iq: Stanza) -> None:
    if iq.payload.get("node"):
        raise StanzaError("item-not-found")


def _info(identities: list[tuple[str, str, str]], features: list[str]) -> bytes:
    said = "".join(
        f"<identity category='{category}' type='{type_}'{attribute('name', name)}/>"
        for category, type_, name in identities
    ) + "".join(f"<feature var={quoteattr(feature)}/>" for feature in features)
    return f"<query xmlns='{ns.DISCO_INFO}'>{said}</query>".encode()
