"""RFC 6121 section 8: what becomes of a stanza for a local account. Pure: a table and a lookup.

The caller says who is there; the answer says what to do. Two situations are not in the table because they
have one answer each: a full JID with a matching session gets the stanza (8.5.3.1), whatever it is; and an
account that does not exist is treated as having no session (8.5.1), except that nothing is stored for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import TypeVar

from tidings.kit.module import MESSAGE, PRESENCE, Session


class Action(Enum):
    """What becomes of a stanza."""

    # To each available session with a non-negative priority (8.5.2.1.1).
    NON_NEGATIVE = auto()
    # To every available session (8.5.2.1.2).
    AVAILABLE = auto()
    # Stored until a session comes, or else <service-unavailable/> (8.5.2.2.1).
    STORE = auto()
    # <service-unavailable/> to the sender.
    BOUNCE = auto()
    # Nothing, and nobody is told.
    IGNORE = auto()


class Addressed(Enum):
    """The address, and who is behind it."""

    # The bare JID; at least one available session has a non-negative priority.
    BARE_PRESENT = auto()
    # The bare JID; no session is available, or all have negative priorities (8.5.2.2 and 8.5.2.1.1).
    BARE_ABSENT = auto()
    # A full JID without a matching session, while others of the account are there.
    FULL_PRESENT = auto()
    # A full JID without a matching session, and nobody is there.
    FULL_ABSENT = auto()


# 8.5.2.1.1, 8.5.2.2.1, 8.5.3.2.1: by type of message; a type that is unknown or missing is "normal" (5.2.2).
MESSAGES: dict[tuple[str, Addressed], Action] = {
    ("normal", Addressed.BARE_PRESENT): Action.NON_NEGATIVE,
    ("normal", Addressed.BARE_ABSENT): Action.STORE,
    ("normal", Addressed.FULL_PRESENT): Action.BOUNCE,
    ("normal", Addressed.FULL_ABSENT): Action.BOUNCE,
    ("chat", Addressed.BARE_PRESENT): Action.NON_NEGATIVE,
    ("chat", Addressed.BARE_ABSENT): Action.STORE,
    ("chat", Addressed.FULL_PRESENT): Action.NON_NEGATIVE,
    ("chat", Addressed.FULL_ABSENT): Action.STORE,
    ("groupchat", Addressed.BARE_PRESENT): Action.BOUNCE,
    ("groupchat", Addressed.BARE_ABSENT): Action.BOUNCE,
    ("groupchat", Addressed.FULL_PRESENT): Action.BOUNCE,
    ("groupchat", Addressed.FULL_ABSENT): Action.BOUNCE,
    ("headline", Addressed.BARE_PRESENT): Action.NON_NEGATIVE,
    ("headline", Addressed.BARE_ABSENT): Action.IGNORE,
    ("headline", Addressed.FULL_PRESENT): Action.IGNORE,
    ("headline", Addressed.FULL_ABSENT): Action.IGNORE,
    ("error", Addressed.BARE_PRESENT): Action.IGNORE,
    ("error", Addressed.BARE_ABSENT): Action.IGNORE,
    ("error", Addressed.FULL_PRESENT): Action.IGNORE,
    ("error", Addressed.FULL_ABSENT): Action.IGNORE,
}

MESSAGE_TYPES = frozenset(type_ for type_, _ in MESSAGES)

S = TypeVar("S", bound=Session)


def decide(kind: int, type_: str, addressed: Addressed) -> Action:
    """What becomes of a message or presence for a local account without a matching full JID.

    Presence of the types that concern subscriptions never gets here: it is the roster's business.
    IQs to a bare JID are answered by modules on the account's behalf; what they do not answer, and every
    request to a full JID that is not there, is bounced (8.5.2.1.3, 8.5.2.2.3, 8.5.3.2.3).
    """
    if kind == MESSAGE:
        return MESSAGES[type_ if type_ in MESSAGE_TYPES else "normal", addressed]
    if kind == PRESENCE:
        # 8.5.2.1.2 and 8.5.3.2.2.
        return Action.AVAILABLE if addressed is Addressed.BARE_PRESENT else Action.IGNORE
    return Action.BOUNCE if type_ in ("get", "set") else Action.IGNORE


def non_negative(sessions: Iterable[S]) -> list[S]:
    """Who gets a message to the bare JID: all that are available with a priority of zero or more."""
    return [session for session in sessions if session.presence is not None and session.priority >= 0]


def available(sessions: Iterable[S]) -> list[S]:
    return [session for session in sessions if session.presence is not None]
