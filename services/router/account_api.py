"""AccountService: accounts as the command line and administration programs see them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from services.router.authentication import derive_all
from services.router.negotiation import Negotiator
from services.router.sessions import Sessions
from services.router.store import AccountExists, AccountStore
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.router.v1 import account_pb2 as pb
from tidings.api.router.v1.account_pb2_grpc import AccountServiceServicer
from tidings.kit.db import DatabaseAway
from tidings.kit.rpc_errors import TidingsError
from tidings.xmpp.errors import SaslError
from tidings.xmpp.jid import Jid, JidError

MAX_PAGE = 1000


class AccountApi(AccountServiceServicer):
    """Serves router.v1 AccountService."""

    def __init__(
        self,
        hosts: frozenset[str],
        accounts: AccountStore,
        sessions: Sessions,
        negotiator: Negotiator,
        iterations: Callable[[str], int],
    ) -> None:
        self._hosts = hosts
        self._accounts = accounts
        self._sessions = sessions
        self._negotiator = negotiator
        self._iterations = iterations

    async def CreateAccount(self, request: pb.CreateAccountRequest, context: Any) -> pb.CreateAccountResponse:
        jid = self._account(request.jid)
        keys = await self._keys(jid, request.password)
        try:
            await self._accounts.create(jid.domain, jid.local, keys)
        except AccountExists:
            raise TidingsError(
                ErrorReason.ERROR_REASON_EXISTS,
                f"{jid} exists already; `tidings user passwd {jid}` sets a new password",
                jid=str(jid),
            ) from None
        except DatabaseAway:
            raise _away() from None
        return pb.CreateAccountResponse()

    async def SetPassword(self, request: pb.SetPasswordRequest, context: Any) -> pb.SetPasswordResponse:
        jid = await self._existing(request.jid)
        keys = await self._keys(jid, request.password)
        try:
            await self._accounts.set_keys(jid.domain, jid.local, keys)
        except DatabaseAway:
            raise _away() from None
        return pb.SetPasswordResponse()

    async def DeleteAccount(self, request: pb.DeleteAccountRequest, context: Any) -> pb.DeleteAccountResponse:
        jid = await self._existing(request.jid)
        try:
            await self._negotiator.delete_account(jid)
        except DatabaseAway:
            raise _away() from None
        return pb.DeleteAccountResponse()

    async def ListAccounts(self, request: pb.ListAccountsRequest, context: Any) -> pb.ListAccountsResponse:
        if request.host and request.host not in self._hosts:
            raise TidingsError(
                ErrorReason.ERROR_REASON_BAD_REQUEST,
                f"{request.host} is none of the virtual hosts: {', '.join(sorted(self._hosts))}",
            )
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        try:
            rows = await self._accounts.page(request.host or None, request.page_token, size)
        except DatabaseAway:
            raise _away() from None
        response = pb.ListAccountsResponse()
        for row in rows:
            response.accounts.add(
                jid=row.jid, created_unix_ms=row.created_unix_ms, resources=sorted(self._sessions.of(row.jid))
            )
        if len(rows) == size:
            response.next_page_token = rows[-1].jid
        return response

    def _account(self, text: str) -> Jid:
        try:
            jid = Jid.parse(text)
        except JidError as error:
            raise TidingsError(
                ErrorReason.ERROR_REASON_BAD_REQUEST, f"{text!r} is no JID: {error}; write name@host"
            ) from None
        if not jid.local or jid.resource:
            raise TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, f"{text!r} is no account; write name@host")
        if jid.domain not in self._hosts:
            raise TidingsError(
                ErrorReason.ERROR_REASON_BAD_REQUEST,
                f"{jid.domain} is none of the virtual hosts: {', '.join(sorted(self._hosts))}",
            )
        return jid

    async def _existing(self, text: str) -> Jid:
        jid = self._account(text)
        try:
            exists = await self._accounts.exists(jid.domain, jid.local)
        except DatabaseAway:
            raise _away() from None
        if not exists:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_FOUND, f"there is no account {jid}", jid=str(jid))
        return jid

    async def _keys(self, jid: Jid, password: str) -> Any:
        try:
            return await asyncio.to_thread(derive_all, password, self._iterations(jid.domain))
        except SaslError:
            raise TidingsError(
                ErrorReason.ERROR_REASON_BAD_REQUEST,
                "the password is empty or has characters that RFC 8265 forbids (control characters, for example)",
            ) from None


def _away() -> TidingsError:
    return TidingsError(ErrorReason.ERROR_REASON_DATABASE_AWAY, "the database does not answer; try again in a moment")
