"""XEP-0077: In-Band Registration: new accounts where the option allows it, and one's own password."""

from __future__ import annotations

import asyncio

from lxml import etree

from services.router.authentication import derive_all
from services.router.store import AccountExists, AccountStore
from tidings.kit.module import Module, ModuleSpec, Stanza, Where
from tidings.xmpp import ns
from tidings.xmpp.errors import SaslError, StanzaError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.sasl import ScramKeys
from tidings.xmpp.stanza import escape_text

QUERY = f"{{{ns.REGISTER}}}query"


def load(module: Module) -> None:
    register = _Register(module)
    module.stream_feature(register.feature, authenticated=False)
    module.feature(ns.REGISTER)
    module.on_iq_before_authentication(QUERY, register.form, types=("get",))
    module.on_iq_before_authentication(QUERY, register.create, types=("set",))
    where = (Where.SERVER, Where.ACCOUNT)
    module.on_iq(QUERY, register.registered, types=("get",), where=where)
    module.on_iq(QUERY, register.change, types=("set",), where=where)


MODULE = ModuleSpec("register", load, xep="XEP-0077", version="2.4")


class _Register:
    def __init__(self, module: Module) -> None:
        self._module = module
        self._accounts = module.router.store(AccountStore)

    def _open(self, host: str) -> bool:
        return bool(self._module.options.for_host(host, "registration"))

    # --- before authentication (3.1) ---

    def feature(self, host: str) -> bytes:
        return b"<register xmlns='%b'/>" % ns.REGISTER_FEATURE.encode() if self._open(host) else b""

    def form(self, _iq: Stanza, host: str) -> bytes:
        if not self._open(host):
            raise StanzaError("not-allowed", "accounts are made by the administrators here")
        return (
            f"<query xmlns='{ns.REGISTER}'><instructions>Choose a name and a password.</instructions>"
            "<username/><password/></query>"
        ).encode()

    async def create(self, iq: Stanza, host: str) -> bytes:
        if not self._open(host):
            raise StanzaError("not-allowed", "accounts are made by the administrators here")
        name, password = _field(iq.payload, "username"), _field(iq.payload, "password")
        if not name or not password:
            raise StanzaError("not-acceptable", "a name and a password are wanted")
        account = _account(name, host)
        try:
            await self._accounts.create(host, account.local, await self._keys(host, password))
        except AccountExists:
            raise StanzaError("conflict") from None
        self._module.log.info("account_registered", account=str(account))
        return b""

    # --- with a session (3.2, 3.3) ---

    def registered(self, iq: Stanza) -> bytes:
        session = self._own(iq)
        return (
            f"<query xmlns='{ns.REGISTER}'><registered/>"
            f"<username>{escape_text(session.local)}</username><password/></query>"
        ).encode()

    async def change(self, iq: Stanza) -> bytes:
        account = self._own(iq)
        if iq.payload.find(f"{{{ns.REGISTER}}}remove") is not None:
            if len(iq.payload) != 1:
                raise StanzaError("bad-request", "<remove/> stands alone")
            self._module.after(iq, lambda: self._module.router.delete_account(account))
            return b""
        name, password = _field(iq.payload, "username"), _field(iq.payload, "password")
        if not name or not password:
            raise StanzaError("bad-request", "a name and a new password are wanted")
        if _account(name, account.domain) != account:
            raise StanzaError("not-allowed", "only one's own password can be changed")
        await self._accounts.set_keys(account.domain, account.local, await self._keys(account.domain, password))
        return b""

    def _own(self, iq: Stanza) -> Jid:
        if iq.session is None or iq.to not in (iq.session.jid.bare, Jid("", iq.session.jid.domain, "")):
            raise StanzaError("forbidden")
        return iq.session.jid.bare

    async def _keys(self, host: str, password: str) -> dict[str, ScramKeys]:
        iterations = self._module.options.for_host(host, "scram-iterations")
        try:
            return await asyncio.to_thread(derive_all, password, iterations)
        except SaslError:
            raise StanzaError("not-acceptable", "the password has characters that are not allowed") from None


def _field(query: etree._Element, name: str) -> str:
    return query.findtext(f"{{{ns.REGISTER}}}{name}") or ""


def _account(name: str, host: str) -> Jid:
    try:
        account = Jid.parse(f"{name}@{host}")
    except JidError:
        raise StanzaError("not-acceptable", "the name has characters that are not allowed") from None
    if not account.local or account.resource or account.domain != host:
        raise StanzaError("not-acceptable", "the name has characters that are not allowed")
    return account
