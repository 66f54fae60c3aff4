"""Who may log in: the server's side of SASL (RFC 6120 6), over stored SCRAM keys.

Passwords are never stored. A name that does not exist runs through the same steps as one that does, with
keys made up from a key in the database, so that its answers, their salt and their cost tell nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from scramp import ScramException, ScramMechanism

from services.router.store import AccountStore
from tidings.api.router.v1.router_pb2 import StreamOpened, Transport
from tidings.xmpp import ns, sasl
from tidings.xmpp.errors import SaslError
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.sasl import ScramKeys

# The hashes for which keys are stored, the strongest first: the order in which mechanisms are offered.
HASHES = ("SHA-512", "SHA-256", "SHA-1")
PLUS = "-PLUS"
BINDING_TYPE = "tls-server-end-point"
SALT_BYTES = 16

# Hashes that run at once: PBKDF2 takes milliseconds of a core, and a storm of log-ins by PLAIN must leave
# some for everything else.
CONCURRENT_HASHES = 4


@dataclass(frozen=True, slots=True)
class Success:
    """The client is who it says; `data` goes with the success."""

    account: Jid
    data: bytes | None = None


class Exchange(Protocol):
    """One run of a mechanism."""

    async def step(self, data: bytes) -> bytes | Success:
        """Takes a message of the client; gives the next challenge, or the end. Raises SaslError."""


def derive_all(password: str, iterations: int) -> dict[str, ScramKeys]:
    """The keys to store for a password, by hash. Takes tens of milliseconds: call it in a thread.

    Raises SaslError for a password that is empty or has forbidden characters.
    """
    return {name: sasl.derive_keys(name, password, secrets.token_bytes(SALT_BYTES), iterations) for name in HASHES}


class Authentication:
    """Offers mechanisms and runs them."""

    def __init__(
        self, accounts: AccountStore, iterations: Callable[[str], int], allow_plaintext: Callable[[], bool]
    ) -> None:
        self._accounts = accounts
        self._iterations = iterations
        self._allow_plaintext = allow_plaintext
        self._hashing = asyncio.Semaphore(CONCURRENT_HASHES)
        self._fake_salt_key: bytes | None = None

    # --- what is offered ---

    def mechanisms(self, stream: StreamOpened) -> list[str]:
        """What a stream may use, the strongest first. Nothing in clear unless that was asked for."""
        encrypted = stream.HasField("tls")
        if not encrypted and not self._allow_plaintext():
            return []
        offered: list[str] = []
        if _bindable(stream):
            offered += [f"SCRAM-{name}{PLUS}" for name in HASHES]
        offered += [f"SCRAM-{name}" for name in HASHES]
        offered.append("PLAIN")
        return offered

    def features(self, stream: StreamOpened) -> bytes:
        """The stream features for authentication (RFC 6120 6.4.1, XEP-0440)."""
        names = self.mechanisms(stream)
        if not names:
            return b""
        listed = "".join(f"<mechanism>{name}</mechanism>" for name in names)
        text = f"<mechanisms xmlns='{ns.SASL}'>{listed}</mechanisms>"
        if _bindable(stream):
            text += (
                f"<sasl-channel-binding xmlns='{ns.SASL_CB}'>"
                f"<channel-binding type='{BINDING_TYPE}'/></sasl-channel-binding>"
            )
        return text.encode()

    # --- running one ---

    def begin(self, mechanism: str, stream: StreamOpened) -> Exchange:
        """A new run of a mechanism. Raises SaslError when it was not offered to this stream."""
        if mechanism not in self.mechanisms(stream):
            if not stream.HasField("tls") and not self._allow_plaintext():
                raise SaslError("encryption-required")
            raise SaslError("invalid-mechanism")
        if mechanism == "PLAIN":
            return _Plain(self, stream.host)
        return _Scram(self, stream, mechanism)

    async def keys(self, host: str, local: str, hash_name: str) -> tuple[ScramKeys, bool]:
        """The keys of an account, and whether it exists. Made-up ones, always the same, where it does not."""
        keys = await self._accounts.keys(host, local, hash_name)
        if keys is not None:
            return keys, True
        if self._fake_salt_key is None:
            self._fake_salt_key = await self._accounts.shared_key("fake-salt-key")
        salt = sasl.fake_salt(self._fake_salt_key, host, local, hash_name)[:SALT_BYTES]
        size = {"SHA-1": 20, "SHA-256": 32, "SHA-512": 64}[hash_name]
        return (
            ScramKeys(salt, secrets.token_bytes(size), secrets.token_bytes(size), self._iterations(host)),
            False,
        )

    async def verify_plain(self, password: str, keys: ScramKeys, hash_name: str) -> bool:
        async with self._hashing:
            return await asyncio.to_thread(sasl.verify_plain, hash_name, password, keys)

    @staticmethod
    def account(host: str, name: str, authzid: str) -> Jid:
        """The account that a name stands for; acting for others is not allowed (RFC 6120 6.3.8)."""
        try:
            account = Jid.parse(f"{name}@{host}")
            if authzid and Jid.parse(authzid) != account:
                raise SaslError("invalid-authzid")
        except JidError:
            raise SaslError("not-authorized") from None
        if not account.local or account.resource or account.domain != host:
            raise SaslError("not-authorized")
        return account


def _bindable(stream: StreamOpened) -> bool:
    """Whether channel binding means something: TLS ends at our connector, on a plain XMPP stream."""
    return stream.transport == Transport.TRANSPORT_TCP and bool(stream.tls.server_end_point)


class _Plain:
    """RFC 4616."""

    # Whose keys a password is checked against: the cheapest hash of those stored.
    HASH = "SHA-256"

    def __init__(self, authentication: Authentication, host: str) -> None:
        self._authentication = authentication
        self._host = host

    async def step(self, data: bytes) -> Success:
        message = sasl.parse_plain(data)
        account = self._authentication.account(self._host, message.authcid, message.authzid)
        keys, exists = await self._authentication.keys(self._host, account.local, self.HASH)
        if not await self._authentication.verify_plain(message.password, keys, self.HASH) or not exists:
            raise SaslError("not-authorized")
        return Success(account)


class _Scram:
    """RFC 5802 and RFC 7677, by scramp.

    scramp takes no authorisation identity and looks keys up itself, at once: so the first message is read
    here, and scramp gets it without the identity and with ready keys.
    """

    def __init__(self, authentication: Authentication, stream: StreamOpened, mechanism: str) -> None:
        self._authentication = authentication
        self._stream = stream
        self._mechanism = mechanism
        self._plus = mechanism.endswith(PLUS)
        self._hash = mechanism.removesuffix(PLUS).removeprefix("SCRAM-")
        self._server: Any = None
        self._account: Jid | None = None
        self._exists = False

    async def step(self, data: bytes) -> bytes | Success:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise SaslError("malformed-request") from None
        try:
            if self._server is None:
                return await self._first(text)
            return self._final(text)
        except ScramException as error:
            raise SaslError("not-authorized", str(error)) from None

    async def _first(self, text: str) -> bytes:
        first = sasl.parse_scram_first(text.encode())
        if self._plus != first.binding.startswith("p"):
            # RFC 5802 6: "p" goes with -PLUS, and only with it.
            raise SaslError("malformed-request", "channel binding flag and mechanism do not fit")
        account = self._authentication.account(self._stream.host, first.username, first.authzid)
        keys, self._exists = await self._authentication.keys(self._stream.host, account.local, self._hash)
        binding = (BINDING_TYPE, self._stream.tls.server_end_point) if _bindable(self._stream) else None
        ready = (keys.salt, keys.stored_key, keys.server_key, keys.iterations)
        server = ScramMechanism(self._mechanism).make_server(lambda _name: ready, channel_binding=binding)
        server.set_client_first(f"{first.binding},,{first.bare}")
        if first.authzid:
            server.gs2_header = _HeaderWithAuthzid(f"{first.binding},{first.raw_authzid},", self._plus)
        self._server = server
        self._account = account
        return str(server.get_server_first()).encode()

    def _final(self, text: str) -> Success:
        assert self._account is not None
        self._server.set_client_final(text)
        if not self._exists:
            raise SaslError("not-authorized")
        return Success(self._account, str(self._server.get_server_final()).encode())


class _HeaderWithAuthzid:
    """The GS2 header as the client sent it, for scramp's check of `c=` (RFC 5802 7)."""

    def __init__(self, header: str, plus: bool) -> None:
        self._header = header.encode()
        self._plus = plus

    def make_cbind_input(self, binding: Any) -> bytes:
        return self._header + (bytes(binding.data) if self._plus else b"")
