"""RFC 6121 Appendix A, written down a second time: from the user's side, as sets of states."""

from __future__ import annotations

import pytest

from services.router.subscription import INBOUND, OUTBOUND, STATES, TYPES, State

N, NO, NI, NOI, T, TI, F, FO, B = STATES


def key(state: State) -> str:
    return state.subscription + ("+out" if state.pending_out else "") + ("+in" if state.pending_in else "")


def test_both_tables_have_every_cell() -> None:
    assert set(OUTBOUND) == set(INBOUND) == {(type_, state) for type_ in TYPES for state in STATES}


@pytest.mark.parametrize("state", STATES, ids=key)
def test_asking_and_giving_up_is_always_passed_on(state: State) -> None:
    """A.2.1, A.2.2: MUST be routed in every state."""
    assert OUTBOUND["subscribe", state].passed
    assert OUTBOUND["unsubscribe", state].passed


@pytest.mark.parametrize("state", STATES, ids=key)
def test_answers_are_passed_on_where_they_change_something(state: State) -> None:
    """A.2.3, A.2.4, A.3.2, A.3.3, A.3.4."""
    for table, types in (
        (OUTBOUND, ("subscribed", "unsubscribed")),
        (INBOUND, ("unsubscribe", "subscribed", "unsubscribed")),
    ):
        for type_ in types:
            step = table[type_, state]
            assert step.passed == (step.state != state), (type_, key(state))


@pytest.mark.parametrize("state", STATES, ids=key)
def test_a_request_that_waits_or_is_granted_is_not_shown_again(state: State) -> None:
    """A.3.1."""
    shown = not state.pending_in and state.subscription in ("none", "to")
    assert INBOUND["subscribe", state].passed == shown
    assert INBOUND["subscribe", state].state.pending_in == (state.pending_in or shown)


@pytest.mark.parametrize("state", STATES, ids=key)
def test_each_side_changes_only_its_own_half(state: State) -> None:
    """What we send about seeing them leaves "from" and their request alone, and the other way round."""
    seen_by_them = state.subscription in ("from", "both")
    we_see = state.subscription in ("to", "both")
    for table, type_ in (
        (OUTBOUND, "subscribe"),
        (OUTBOUND, "unsubscribe"),
        (INBOUND, "subscribed"),
        (INBOUND, "unsubscribed"),
    ):
        after = table[type_, state].state
        assert (after.subscription in ("from", "both"), after.pending_in) == (seen_by_them, state.pending_in)
    for table, type_ in (
        (INBOUND, "subscribe"),
        (INBOUND, "unsubscribe"),
        (OUTBOUND, "subscribed"),
        (OUTBOUND, "unsubscribed"),
    ):
        after = table[type_, state].state
        assert (after.subscription in ("to", "both"), after.pending_out) == (we_see, state.pending_out)


@pytest.mark.parametrize(
    ("table", "type_", "before", "after"),
    [
        (OUTBOUND, "subscribe", N, NO), (OUTBOUND, "subscribe", NI, NOI), (OUTBOUND, "subscribe", F, FO),
        (OUTBOUND, "unsubscribe", B, F), (OUTBOUND, "unsubscribe", TI, NI), (OUTBOUND, "unsubscribe", NO, N),
        (OUTBOUND, "subscribed", TI, B), (OUTBOUND, "subscribed", NOI, FO), (OUTBOUND, "subscribed", NI, F),
        (OUTBOUND, "unsubscribed", B, T), (OUTBOUND, "unsubscribed", FO, NO), (OUTBOUND, "unsubscribed", TI, T),
        (INBOUND, "subscribed", FO, B), (INBOUND, "subscribed", NOI, TI), (INBOUND, "subscribed", NO, T),
        (INBOUND, "unsubscribed", B, F), (INBOUND, "unsubscribed", TI, NI), (INBOUND, "unsubscribed", FO, F),
        (INBOUND, "unsubscribe", B, T), (INBOUND, "unsubscribe", NOI, NO), (INBOUND, "subscribe", T, TI),
    ],
)  # fmt: skip
def test_cells_as_the_rfc_prints_them(table: object, type_: str, before: State, after: State) -> None:
    assert table[type_, before].state == after  # type: ignore[index]
