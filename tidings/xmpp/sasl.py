"""What SASL needs without I/O: the messages of PLAIN and SCRAM, and the keys that are stored."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Any, NamedTuple

from precis_i18n import get_profile

from tidings.xmpp.errors import SaslError

_password: Any = get_profile("OpaqueString")

_HASHES = {"SHA-1": "sha1", "SHA-256": "sha256", "SHA-512": "sha512"}

# A password of more is no password but an attempt to make us hash for long.
MAX_PASSWORD_BYTES = 1024

_SCRAM_FIRST = re.compile(
    r"(n|y|p=[A-Za-z0-9.-]+),((?:a=[^,]+)?),((?:m=[^,]*,)?n=([^,]+),r=([!-+\--~]+)(?:,.*)?)", re.S
)


class ScramKeys(NamedTuple):
    """What is stored of a password for one hash (RFC 5802 3)."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int


class Plain(NamedTuple):
    """RFC 4616."""

    authzid: str
    authcid: str
    password: str


class ScramFirst(NamedTuple):
    """A client's first message (RFC 5802 7)."""

    # "n", "y", or "p=" and the type of channel binding.
    binding: str
    authzid: str
    # As it was sent: "a=..." or ''.
    raw_authzid: str
    username: str
    # The message without its GS2 header.
    bare: str


def prepare_password(password: str) -> str:
    """RFC 8265 4.2 (OpaqueString). Raises SaslError."""
    if len(password.encode("utf-8", "replace")) > MAX_PASSWORD_BYTES:
        raise SaslError("malformed-request", "the password is too long")
    try:
        return str(_password.enforce(password))
    except UnicodeError:
        raise SaslError("not-authorized", "a password with forbidden characters, or empty") from None


def derive_keys(hash_name: str, password: str, salt: bytes, iterations: int) -> ScramKeys:
    """Salts and hashes a password; takes milliseconds. `hash_name`: SHA-1, SHA-256 or SHA-512."""
    name = _HASHES[hash_name]
    salted = hashlib.pbkdf2_hmac(name, prepare_password(password).encode(), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", name)
    return ScramKeys(
        salt, hashlib.new(name, client_key).digest(), hmac.digest(salted, b"Server Key", name), iterations
    )


def verify_plain(hash_name: str, password: str, keys: ScramKeys) -> bool:
    """Whether a password is the one of these keys; takes milliseconds whatever the answer."""
    try:
        derived = derive_keys(hash_name, password, keys.salt, keys.iterations)
    except SaslError:
        return False
    return hmac.compare_digest(derived.stored_key, keys.stored_key)


def fake_salt(key: bytes, host: str, local: str, hash_name: str) -> bytes:
    """The salt that a name without an account shows: always the same, and like a real one."""
    return hmac.digest(key, f"{hash_name}\0{host}\0{local}".encode(), "sha256")


def parse_plain(data: bytes) -> Plain:
    """RFC 4616 2. Raises SaslError."""
    try:
        authzid, authcid, password = data.decode().split("\0")
    except ValueError:
        raise SaslError("malformed-request", "PLAIN is identity NUL name NUL password, in UTF-8") from None
    if not authcid or not password:
        raise SaslError("malformed-request", "PLAIN needs a name and a password")
    return Plain(authzid, authcid, password)


def parse_scram_first(data: bytes) -> ScramFirst:
    """RFC 5802 7, client-first-message. Raises SaslError."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise SaslError("malformed-request", "not UTF-8") from None
    match = _SCRAM_FIRST.fullmatch(text)
    if match is None:
        raise SaslError("malformed-request", "no SCRAM message")
    binding, raw_authzid, bare, username, _nonce = match.groups()
    if bare.startswith("m="):
        raise SaslError("malformed-request", "an extension that must be understood is not")
    return ScramFirst(binding, _saslname(raw_authzid[2:]), raw_authzid, _saslname(username), bare)


def _saslname(text: str) -> str:
    """RFC 5802 5.1: "=2C" and "=3D" stand for comma and equals sign, and no other "=" may be there."""
    if re.search("=(?!2C|3D)", text):
        raise SaslError("malformed-request", "a name that is not escaped")
    return text.replace("=2C", ",").replace("=3D", "=")
