"""Where messages are kept: the archive and what waits for its account, in one. The port, and what is pure about it.

A message has one row for each account that it concerns: the receiver's, and the sender's where that keeps an archive.
Two marks say why the row is there: *pending* while no session of the account has acknowledged it, *archived* while it
belongs to the archive. A row without either is no more.
"""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from tidings.xmpp import ns
from tidings.xmpp.jid import Jid

# Before the name of a session that holds a message because it has claimed it: nobody else was given it.
CLAIMED = "~"

# Seconds between two looks at what waits to be committed.
LOOK = 0.01

# Ids whose text is kept: those of messages that are being written now.
CACHED = 16_384
# Stanzas of one session in a row whose ids begin alike.
TOGETHER = 64

# What the store calls when a message is safe: None, or why it never will be.
Done = Callable[[Exception | None], None]


class Message(NamedTuple):
    """An account's copy of a message, to be written."""

    # Bare.
    account: Jid
    # 16 bytes; see `message_id`.
    id: bytes
    # The other side's JID, full where it has a resource.
    peer: str
    # The stanza's identity: the session (or component instance) that sent it, and its number there; "" and 0: none.
    origin: str
    number: int
    from_jid: str
    received_unix_ms: int
    stanza: bytes
    # No session of the account has acknowledged it.
    pending: bool
    archived: bool
    # The session that it was given to when it was written, if any.
    holder: str = ""


class Kept(NamedTuple):
    """A message as it is read back."""

    # Its place among the account's messages: grows in the order in which they were committed.
    position: int
    id: bytes
    peer: str
    origin: str
    number: int
    from_jid: str
    received_unix_ms: int
    stanza: bytes
    # Of pending ones: sessions have got it when it came; which ones, their routers know. Else it was stored, or
    # claimed by a session that is no more, and nobody else has had it.
    given: bool = False


@dataclass(frozen=True, slots=True)
class ArchiveQuery:
    """A page of an account's archive (XEP-0313 4, XEP-0059)."""

    # XEP-0313 4.1.1: a bare JID stands for all its resources, a full one for itself.
    with_: Jid | None = None
    # 4.1.2: both inclusive.
    start: int | None = None
    end: int | None = None
    # Ids; both exclusive.
    after: bytes | None = None
    before: bytes | None = None
    # The last messages of what is asked for, not the first ones (XEP-0059 2.3 and 2.5).
    backwards: bool = False
    limit: int = 50


class Page(NamedTuple):
    """Messages in the order of their positions, and whether there are no more in the direction of the query."""

    messages: list[Kept]
    complete: bool


class UnknownId(Exception):
    """No message of the account has that id: <item-not-found/> (XEP-0313 4.3.2)."""


class Preferences(NamedTuple):
    """Whose messages an account archives (XEP-0441 2.1)."""

    # "always", "never" or "roster".
    default: str
    always: tuple[str, ...]
    never: tuple[str, ...]


class MessageStore(Protocol):
    """The messages of accounts.

    What is asynchronous may raise DatabaseAway: then it may or may not have happened, and may be repeated. `write`
    and `delivered` never do. What they have been given waits in memory until it is committed, and this queue has no
    bound of its own: those who fill it stop reading their sockets when `waiting_bytes` is high.
    """

    def write(self, message: Message, done: Done) -> None:
        """Puts a message into the next commit.

        `done(None)` is called when it is committed, or was kept already under its id, or needs no writing any more;
        `done(error)` only for a message that can never be written, by `supersede`, and when the store stops. While
        the database is away the message waits, in order, and is tried again. `done` is called on the loop, and in the
        order of the writes of an account; out of turn only for messages that need no writing.
        """

    async def keep(self, message: Message) -> None:
        """Writes a message and returns when it is committed. Raises DatabaseAway at the first commit that fails, and
        the error of a message that can never be written."""

    def delivered(self, account: Jid, ids: Iterable[bytes]) -> None:
        """A session has acknowledged messages: they are pending no longer.

        It is written soon, never before the message itself, and tried again while the database is away. A message
        that waits to be written, and was not tried yet, is written as not pending; if it is not archived either it is
        not written at all, and its `done(None)` is called at once. What is not known may be on its way from another
        router: it MUST be marked when it comes within two minutes. Ids that are never known do no harm.
        """

    def supersede(self, is_others: Callable[[str], bool]) -> None:
        """Messages of sessions that are others' by now (`is_others`: by their ids; '' where there is none) that wait
        to be committed are not written any more: those deal with them. `done` gets `Superseded`, and who waits in
        `keep` is cancelled. What is under way may be written all the same."""

    @property
    def waiting_bytes(self) -> int:
        """What waits to be committed: the stanzas' bytes, and something for each message and mark."""

    @property
    def away(self) -> bool:
        """Whether the last commit failed: what waits is tried again."""

    def is_writing_for(self, account: Jid) -> bool:
        """Whether a message that is to be pending for an account waits to be committed: nobody can read it yet."""

    @property
    def marks(self) -> Sequence[tuple[int, int]]:
        """How many acknowledged messages were ever to be marked, and how many of these marks are committed, for each
        part of the store that commits by itself. One whose message is being written counts from when that is done."""

    @property
    def unmatched(self) -> Collection[bytes]:
        """Acknowledged messages, by id, that this router has not found to mark them, for some seconds: they may yet
        come, and would be offered to whoever does not know that they are acknowledged."""

    @property
    def oldest_waiting(self) -> float:
        """Since when, by the monotonic clock, the oldest message waits to be committed; 0.0 when none does."""

    async def pending(
        self, account: Jid, session: str, limit: int, after: int = 0, alone: bool = False, over: Collection[str] = ()
    ) -> list[Kept]:
        """Claims the first pending messages that no other living session holds, `limit` at most, and returns them.

        `after`: only those of higher positions. `alone`: only those that the session holds already. `over`: sessions
        that live no more, though the table of sessions may not say so yet.

        Of several sessions that come at once, on whichever routers, each message MUST go to one; the same session is
        given again what it holds. A claim is void when its session is not in the table of sessions any more; nobody
        needs to give it back. What a session has acknowledged at this router is not among them, also before that is
        written.
        """

    async def pending_count(self, account: Jid) -> int:
        """How many messages no session has acknowledged, whoever holds them."""

    async def page(self, account: Jid, query: ArchiveQuery) -> Page:
        """Archived messages. Raises UnknownId. Who asks for what comes after the last one that it has MUST get, in
        the end, all that are ever committed."""

    async def expire(self, host: str, before_unix_ms: int, limit: int) -> int:
        """Takes messages received before a moment out of the archives of a host, `limit` at most, oldest first: no
        holes are left (XEP-0313 3). Pending ones stay pending. Returns how many; fewer than `limit`: no more for now.
        """

    async def preferences(self, account: Jid) -> Preferences | None:
        """What the account has set; None where it has set nothing."""

    async def set_preferences(self, account: Jid, preferences: Preferences) -> None: ...

    async def delete_all(self, account: Jid) -> None:
        """Removes all that is kept for an account, or waits to be, and its preferences."""


async def written(store: MessageStore, timeout: float) -> bool:
    """Waits until all is committed that waits for it now, so many seconds at most; whether it is. `math.inf`: also
    while the database is away."""
    now = time.monotonic()
    ends = now + timeout
    while 0.0 < store.oldest_waiting <= now:
        if time.monotonic() > ends:
            return False
        await asyncio.sleep(LOOK)
    return True


async def marked(store: MessageStore) -> None:
    """Waits until all marks are committed that wait for it now."""
    await written(store, math.inf)
    put = [put for put, _ in store.marks]
    while any(done < wanted for (_, done), wanted in zip(store.marks, put, strict=True)):  # noqa: ASYNC110 - soon
        await asyncio.sleep(LOOK)


def message_id(key: bytes, account: str, origin: str, number: int) -> bytes:
    """The id of an account's copy of a stanza, 16 bytes: the same whoever makes it, so that a message that is written
    twice is kept once; known before it is delivered; and not to be guessed without `key`, as XEP-0313 3 and XEP-0359
    want it. A stanza without origin or number gets a random one.

    Ids of a conversation begin alike for a while, so that a database that has more of them than memory finds the
    place of nearly each one in what it has just read: with random ones 200 clients got a third slower within their
    first 500,000 messages (MariaDB with 64 MB). Who sees many can tell when their sender has sent about `TOGETHER`
    more stanzas, and nothing else.

    `key`: `AccountStore.shared_key("message-id-key")`.
    """
    if not origin or not number:
        return secrets.token_bytes(16)
    place, begun = _place(key, account, origin, number // TOGETHER)
    rest = begun.copy()
    rest.update(b"%d" % number)
    return place + rest.digest()


@lru_cache(maxsize=CACHED)
def _place(key: bytes, account: str, origin: str, block: int) -> tuple[bytes, hashlib.blake2b]:
    """The 4 bytes with which ids begin, and the hash of the other 12, but for the number."""
    begun = hashlib.blake2b(f"{account}\0{origin}\0".encode(), digest_size=12, key=key)
    place = begun.copy()
    place.update(b"block %d" % block)
    return place.digest()[:4], begun


_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@lru_cache(maxsize=CACHED)
def id_text(id: bytes) -> str:
    """The id as clients and the database see it: 22 characters, URL-safe base64 without padding."""
    return binascii.b2a_base64(id, newline=False)[:22].translate(_URL_SAFE).decode()


def id_bytes(text: str) -> bytes | None:
    """The id that a text stands for; None when it is none."""
    if len(text) != 22:
        return None
    try:
        known = binascii.a2b_base64(text.encode("ascii").translate(_FROM_URL_SAFE) + b"==", strict_mode=True)
    except ValueError:
        return None
    # One id has one text: not every last character is that of 16 bytes, and + and / are not ours.
    return known if id_text(known) == text else None


def _names(namespace: str, *locals_: str) -> frozenset[str]:
    return frozenset(f"{{{namespace}}}{local}" for local in locals_)


# RFC 6121 8.5.2.2.1, XEP-0160 3: types that are not for those who are away, nor for the archive. All others are
# "normal" or "chat", or count as such (RFC 6121 5.2.2).
_PASSING = frozenset(("headline", "groupchat", "error"))

_STORE = f"{{{ns.HINTS}}}store"
_NOT_ARCHIVED = _names(ns.HINTS, "no-store", "no-permanent-store")
_HINTS = _names(ns.HINTS, "no-store", "no-permanent-store", "no-copy")
_CHAT_STATES = _names(ns.CHAT_STATES, "active", "composing", "paused", "inactive", "gone")
# What may stand beside a chat state without being content (XEP-0085 5.6, XEP-0359).
_BESIDE = frozenset(("thread",)) | _HINTS | _names(ns.STANZA_ID, "origin-id", "stanza-id")

# Content. XEP-0313 6.1.1 names the body, and lets a server add what belongs to conversations: what is encrypted
# (XEP-0027, 0373, 0384, and 0380 for others), and what tells what became of a message (0184, 0333), without which a
# device that was away shows it as not received or not read.
_CONTENT = (
    frozenset(("body", _STORE, "{jabber:x:encrypted}x", "{urn:xmpp:openpgp:0}openpgp", "{urn:xmpp:eme:0}encryption"))
    | _names("eu.siacs.conversations.axolotl", "encrypted")
    | _names("urn:xmpp:omemo:1", "encrypted")
    | _names("urn:xmpp:omemo:2", "encrypted")
    | _names("urn:xmpp:receipts", "received")
    | _names("urn:xmpp:chat-markers:0", "received", "displayed", "acknowledged")
)


def wanted(type_: str, children: Collection[str]) -> tuple[bool, bool]:
    """Whether a message is pending until it is acknowledged, and whether it is for archives.

    By its type, and the names of its top-level children: "body", "{urn:xmpp:hints}no-store".
    """
    if type_ in _PASSING:
        return False, False
    if len(children) == 1 and "body" in children:
        return True, True
    names = frozenset(children)
    if _STORE not in names and not _CHAT_STATES.isdisjoint(names) and names <= _CHAT_STATES | _BESIDE:
        # XEP-0160 3: that somebody types is of no use later.
        return False, False
    # XEP-0334 4.1, 4.2: no archive. What is acknowledged must not be lost, so it waits for its receiver all the same.
    return True, not _CONTENT.isdisjoint(names) and _NOT_ARCHIVED.isdisjoint(names)
