"""RFC 6121 8.5, cell by cell."""

from __future__ import annotations

import pytest

from services.router.delivery import MESSAGES, Action, Addressed, decide
from tidings.kit.module import IQ, MESSAGE, PRESENCE

BP, BA, FP, FA = Addressed.BARE_PRESENT, Addressed.BARE_ABSENT, Addressed.FULL_PRESENT, Addressed.FULL_ABSENT

# clause, type, address -> action
CELLS = [
    ("8.5.2.1.1", "normal", BP, Action.NON_NEGATIVE),
    ("8.5.2.1.1", "chat", BP, Action.NON_NEGATIVE),
    ("8.5.2.1.1", "headline", BP, Action.NON_NEGATIVE),
    ("8.5.2.1.1", "groupchat", BP, Action.BOUNCE),
    ("8.5.2.1.1", "error", BP, Action.IGNORE),
    ("8.5.2.2.1", "normal", BA, Action.STORE),
    ("8.5.2.2.1", "chat", BA, Action.STORE),
    ("8.5.2.2.1", "groupchat", BA, Action.BOUNCE),
    ("8.5.2.2.1", "headline", BA, Action.IGNORE),
    ("8.5.2.2.1", "error", BA, Action.IGNORE),
    ("8.5.3.2.1", "normal", FP, Action.BOUNCE),
    ("8.5.3.2.1", "normal", FA, Action.BOUNCE),
    ("8.5.3.2.1", "chat", FP, Action.NON_NEGATIVE),
    ("8.5.3.2.1", "chat", FA, Action.STORE),
    ("8.5.3.2.1", "groupchat", FP, Action.BOUNCE),
    ("8.5.3.2.1", "groupchat", FA, Action.BOUNCE),
    ("8.5.3.2.1", "headline", FP, Action.IGNORE),
    ("8.5.3.2.1", "headline", FA, Action.IGNORE),
    ("8.5.3.2.1", "error", FP, Action.IGNORE),
    ("8.5.3.2.1", "error", FA, Action.IGNORE),
]


def test_every_cell_is_written_here_too() -> None:
    assert {(type_, addressed) for _, type_, addressed, _ in CELLS} == set(MESSAGES)


@pytest.mark.parametrize(("clause", "type_", "addressed", "action"), CELLS)
def test_message(clause: str, type_: str, addressed: Addressed, action: Action) -> None:
    assert decide(MESSAGE, type_, addressed) is action, clause


@pytest.mark.parametrize("type_", ["", "carol"])
@pytest.mark.parametrize("addressed", Addressed)
def test_a_message_of_unknown_type_is_normal(type_: str, addressed: Addressed) -> None:
    """RFC 6121 5.2.2."""
    assert decide(MESSAGE, type_, addressed) is decide(MESSAGE, "normal", addressed)


def test_presence_reaches_who_is_there_and_nobody_else() -> None:
    """8.5.2.1.2, 8.5.3.2.2."""
    assert [decide(PRESENCE, "", addressed) for addressed in (BP, BA, FP, FA)] == [
        Action.AVAILABLE, Action.IGNORE, Action.IGNORE, Action.IGNORE,
    ]  # fmt: skip


def test_requests_bounce_and_answers_do_not() -> None:
    """8.5.3.2.3, RFC 6120 8.3.1."""
    assert decide(IQ, "get", FA) is decide(IQ, "set", FA) is Action.BOUNCE
    assert decide(IQ, "result", FA) is decide(IQ, "error", FA) is Action.IGNORE
