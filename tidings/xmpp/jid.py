"""Addresses by RFC 7622: localpart, domainpart and resourcepart, each prepared and compared by its profile."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Any

import idna
from precis_i18n import get_profile

# RFC 7622 3.2, 3.3, 3.4: octets of UTF-8 in each part.
MAX_PART_BYTES = 1023

# How many parsed addresses are kept: those of the users that are talking now.
CACHED = 65_536

# RFC 7622 3.3.1: what a localpart must not hold although its PRECIS class allows it.
_EXCLUDED = frozenset("\"&'/:<>@")

# What most addresses look like; the answer of the profiles for them is known without asking them.
# IdentifierClass takes all of ASCII from ! to ~ (RFC 8264 9.11), FreeformClass also the space.
_PLAIN_LOCAL = re.compile(r"[!#-%(-.0-9;=?A-Z\[-~]+")
_PLAIN_RESOURCE = re.compile(r"[ -~]+")
_PLAIN_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PLAIN_DOMAIN = re.compile(rf"{_PLAIN_LABEL}(?:\.{_PLAIN_LABEL})*")

_username: Any = get_profile("UsernameCaseMapped")
_opaque: Any = get_profile("OpaqueString")


class JidError(ValueError):
    """Text that is no address; the stanza error for it is jid-malformed (RFC 6120 8.3.3.8)."""

    condition = "jid-malformed"


class Jid:
    """An address. Immutable; equal when its prepared parts are equal. Parts that it lacks are ''."""

    __slots__ = ("_bare", "_hash", "_text", "bare_text", "domain", "local", "resource")

    local: str
    domain: str
    resource: str
    bare_text: str

    def __init__(self, local: str, domain: str, resource: str) -> None:
        """An address of parts that are prepared already; nothing is checked. See `parse`."""
        self.local = local
        self.domain = domain
        self.resource = resource
        bare = f"{local}@{domain}" if local else domain
        # The text of `bare`.
        self.bare_text = bare
        self._text = f"{bare}/{resource}" if resource else bare
        self._hash = hash(self._text)
        self._bare: Jid | None = None if resource else self

    @staticmethod
    def parse(text: str) -> Jid:
        """Prepares an address (RFC 7622 3.1). Raises JidError."""
        return _parse(text)

    @property
    def bare(self) -> Jid:
        """The address without its resource."""
        if self._bare is None:
            self._bare = _parse(f"{self.local}@{self.domain}" if self.local else self.domain)
        return self._bare

    def with_resource(self, resource: str) -> Jid:
        """This account's address with another resource. Raises JidError for one that is not allowed."""
        return Jid(self.local, self.domain, prepare_resource(resource))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Jid({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Jid) and self._text == other._text)

    def __hash__(self) -> int:
        return self._hash


def normal(text: str) -> str:
    """An address as all of its spellings are compared; what is none stays as it is."""
    try:
        return str(Jid.parse(text))
    except JidError:
        return text


@lru_cache(maxsize=CACHED)
def _parse(text: str) -> Jid:
    # RFC 7622 3.2: the resource begins at the first slash, then the localpart ends at the first @.
    bare, slash, resource = text.partition("/")
    if slash and not resource:
        raise JidError("nothing after the slash")
    local, at, domain = bare.partition("@")
    if not at:
        local, domain = "", bare
    elif not local:
        raise JidError("nothing before the @")
    return Jid(
        prepare_local(local) if local else "",
        prepare_domain(domain),
        prepare_resource(resource) if resource else "",
    )


def prepare_local(text: str) -> str:
    """RFC 7622 3.3: UsernameCaseMapped, less some characters."""
    if _PLAIN_LOCAL.fullmatch(text):
        prepared = text.lower()
    else:
        prepared = _enforce(_username, text)
        if not _EXCLUDED.isdisjoint(prepared):
            raise JidError("a character that names must not have")
    return _sized(prepared)


def prepare_resource(text: str) -> str:
    """RFC 7622 3.4: OpaqueString."""
    return _sized(text if _PLAIN_RESOURCE.fullmatch(text) else _enforce(_opaque, text))


def prepare_domain(text: str) -> str:
    """RFC 7622 3.2: a fully qualified domain name in Unicode, or an IP literal."""
    # 3.2: a final dot, which only says that the name is complete, is stripped.
    name = text.removesuffix(".")
    if len(name) <= 253 and _PLAIN_DOMAIN.fullmatch(name) and "xn--" not in name and not _tagged(name):
        return name
    if name.startswith("["):
        try:
            return f"[{ipaddress.IPv6Address(name.removeprefix('[').removesuffix(']')).compressed}]"
        except ValueError:
            raise JidError("no IPv6 address") from None
    try:
        prepared = idna.decode(idna.encode(name, uts46=True))
    except (idna.IDNAError, UnicodeError):
        raise JidError("no domain name") from None
    return _sized(prepared)


def _tagged(name: str) -> bool:
    """Whether a label has hyphens where IDNA tags stand (RFC 5891 4.2.3.1): the library decides on those."""
    return "--" in name and any(label[2:4] == "--" for label in name.split("."))


def _enforce(profile: Any, text: str) -> str:
    try:
        return str(profile.enforce(text))
    except UnicodeError as error:
        raise JidError(
            f"a character that is not allowed here: {error.reason if hasattr(error, 'reason') else error}"
        ) from None


def _sized(part: str) -> str:
    if not part:
        raise JidError("an empty part")
    if len(part) > MAX_PART_BYTES // 4 and len(part.encode()) > MAX_PART_BYTES:
        raise JidError(f"a part of more than {MAX_PART_BYTES} bytes")
    return part
