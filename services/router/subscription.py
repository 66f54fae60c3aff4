"""Presence subscriptions: the state machine of RFC 6121 Appendix A, as a table. Pure.

A state is what an account's roster says about one contact: the subscription, whether a request of ours is
pending ("out"), and whether one of the contact's is ("in").
"""

from __future__ import annotations

from typing import NamedTuple


class State(NamedTuple):
    """One of the nine states of A.1."""

    subscription: str
    pending_out: bool = False
    pending_in: bool = False


NONE = State("none")
NONE_OUT = State("none", pending_out=True)
NONE_IN = State("none", pending_in=True)
NONE_OUT_IN = State("none", pending_out=True, pending_in=True)
TO = State("to")
TO_IN = State("to", pending_in=True)
FROM = State("from")
FROM_OUT = State("from", pending_out=True)
BOTH = State("both")

STATES = (NONE, NONE_OUT, NONE_IN, NONE_OUT_IN, TO, TO_IN, FROM, FROM_OUT, BOTH)
TYPES = ("subscribe", "subscribed", "unsubscribe", "unsubscribed")


class Step(NamedTuple):
    """What follows: whether the stanza goes on (is routed, or delivered), and the state after it."""

    passed: bool
    state: State


# A.2: what the user sends. The stanza is routed to the contact where `passed`.
OUTBOUND: dict[tuple[str, State], Step] = {
    # A.2.1: always routed.
    ("subscribe", NONE): Step(True, NONE_OUT),
    ("subscribe", NONE_OUT): Step(True, NONE_OUT),
    ("subscribe", NONE_IN): Step(True, NONE_OUT_IN),
    ("subscribe", NONE_OUT_IN): Step(True, NONE_OUT_IN),
    ("subscribe", TO): Step(True, TO),
    ("subscribe", TO_IN): Step(True, TO_IN),
    ("subscribe", FROM): Step(True, FROM_OUT),
    ("subscribe", FROM_OUT): Step(True, FROM_OUT),
    ("subscribe", BOTH): Step(True, BOTH),
    # A.2.2: always routed.
    ("unsubscribe", NONE): Step(True, NONE),
    ("unsubscribe", NONE_OUT): Step(True, NONE),
    ("unsubscribe", NONE_IN): Step(True, NONE_IN),
    ("unsubscribe", NONE_OUT_IN): Step(True, NONE_IN),
    ("unsubscribe", TO): Step(True, NONE),
    ("unsubscribe", TO_IN): Step(True, NONE_IN),
    ("unsubscribe", FROM): Step(True, FROM),
    ("unsubscribe", FROM_OUT): Step(True, FROM),
    ("unsubscribe", BOTH): Step(True, FROM),
    # A.2.3: routed where it answers a request.
    ("subscribed", NONE): Step(False, NONE),
    ("subscribed", NONE_OUT): Step(False, NONE_OUT),
    ("subscribed", NONE_IN): Step(True, FROM),
    ("subscribed", NONE_OUT_IN): Step(True, FROM_OUT),
    ("subscribed", TO): Step(False, TO),
    ("subscribed", TO_IN): Step(True, BOTH),
    ("subscribed", FROM): Step(False, FROM),
    ("subscribed", FROM_OUT): Step(False, FROM_OUT),
    ("subscribed", BOTH): Step(False, BOTH),
    # A.2.4: routed where it takes something away.
    ("unsubscribed", NONE): Step(False, NONE),
    ("unsubscribed", NONE_OUT): Step(False, NONE_OUT),
    ("unsubscribed", NONE_IN): Step(True, NONE),
    ("unsubscribed", NONE_OUT_IN): Step(True, NONE_OUT),
    ("unsubscribed", TO): Step(False, TO),
    ("unsubscribed", TO_IN): Step(True, TO),
    ("unsubscribed", FROM): Step(True, NONE),
    ("unsubscribed", FROM_OUT): Step(True, NONE_OUT),
    ("unsubscribed", BOTH): Step(True, TO),
}

# A.3: what the contact sends. The stanza is delivered to the user where `passed`.
INBOUND: dict[tuple[str, State], Step] = {
    # A.3.1: a request that is granted already is answered for the user (see `answered`).
    ("subscribe", NONE): Step(True, NONE_IN),
    ("subscribe", NONE_OUT): Step(True, NONE_OUT_IN),
    ("subscribe", NONE_IN): Step(False, NONE_IN),
    ("subscribe", NONE_OUT_IN): Step(False, NONE_OUT_IN),
    ("subscribe", TO): Step(True, TO_IN),
    ("subscribe", TO_IN): Step(False, TO_IN),
    ("subscribe", FROM): Step(False, FROM),
    ("subscribe", FROM_OUT): Step(False, FROM_OUT),
    ("subscribe", BOTH): Step(False, BOTH),
    # A.3.2
    ("unsubscribe", NONE): Step(False, NONE),
    ("unsubscribe", NONE_OUT): Step(False, NONE_OUT),
    ("unsubscribe", NONE_IN): Step(True, NONE),
    ("unsubscribe", NONE_OUT_IN): Step(True, NONE_OUT),
    ("unsubscribe", TO): Step(False, TO),
    ("unsubscribe", TO_IN): Step(True, TO),
    ("unsubscribe", FROM): Step(True, NONE),
    ("unsubscribe", FROM_OUT): Step(True, NONE_OUT),
    ("unsubscribe", BOTH): Step(True, TO),
    # A.3.3
    ("subscribed", NONE): Step(False, NONE),
    ("subscribed", NONE_OUT): Step(True, TO),
    ("subscribed", NONE_IN): Step(False, NONE_IN),
    ("subscribed", NONE_OUT_IN): Step(True, TO_IN),
    ("subscribed", TO): Step(False, TO),
    ("subscribed", TO_IN): Step(False, TO_IN),
    ("subscribed", FROM): Step(False, FROM),
    ("subscribed", FROM_OUT): Step(True, BOTH),
    ("subscribed", BOTH): Step(False, BOTH),
    # A.3.4
    ("unsubscribed", NONE): Step(False, NONE),
    ("unsubscribed", NONE_OUT): Step(True, NONE),
    ("unsubscribed", NONE_IN): Step(False, NONE_IN),
    ("unsubscribed", NONE_OUT_IN): Step(True, NONE_IN),
    ("unsubscribed", TO): Step(True, NONE),
    ("unsubscribed", TO_IN): Step(True, NONE_IN),
    ("unsubscribed", FROM): Step(False, FROM),
    ("unsubscribed", FROM_OUT): Step(True, FROM),
    ("unsubscribed", BOTH): Step(True, FROM),
}


def answered(state: State) -> bool:
    """Whether a request is granted already, so that the server answers it (3.1.3, A.3.1)."""
    return state.subscription in ("from", "both")


def sees_us(subscription: str) -> bool:
    """Whether the contact gets the user's presence."""
    return subscription in ("from", "both")


def seen_by_us(subscription: str) -> bool:
    """Whether the user gets the contact's presence."""
    return subscription in ("to", "both")
