"""What becomes of a session's older copies (services/router/old_copies.py)."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from services.router import old_copies
from services.router.sessions import Session
from tests.unit.router.nodes import soon
from tests.unit.router.test_copies import House


async def test_a_connector_that_ends_before_it_has_forgotten_a_copy_has_not_said_so(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_copies, "FORGET_TIMEOUT", 0.01)
    session = house.session(house.here)
    silent, other = house.others(session)
    house.copies.served(session, other)  # type: ignore[arg-type]
    assert silent.forgotten == [session]
    silent.end()
    await soon(lambda: session in house.raised, "its copy counts no more")


async def test_a_holder_that_cannot_be_reached_is_not_kept_for_a_stream_that_resumes(house: House) -> None:
    session = house.session(house.here)
    cut, other = house.others(session)
    cut.handling = None
    house.copies.served(session, house.here)  # type: ignore[arg-type]
    assert session.holder is other
    await soon(lambda: session in house.raised, "its copy counts no more")


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "not ours any more"])
@pytest.mark.parametrize("ends", [False, True], ids=["forgets", "ends"])
async def test_who_is_to_forget_a_copy_has_an_older_one_until_it_says_so_or_the_epoch_is_raised(
    house: House, monkeypatch: pytest.MonkeyPatch, ends: bool, raised: bool
) -> None:
    """Drills, seed 35: what is in the other copies only is not safe until then."""
    monkeypatch.setattr(old_copies, "FORGET_TIMEOUT", 0.01 if ends else 60.0)

    async def keep(session: Session) -> bool:
        await house._raise(session)
        return raised

    house.copies.old.keep = keep
    session = house.session(house.here)
    before, after = house.others(session)
    house.copies.served(session, after)  # type: ignore[arg-type]
    assert session.old_copies == {before}
    if ends:
        before.end()
        await soon(lambda: bool(house.raised), "its copy counts no more")
        assert session.old_copies == {before}, "who has the good one does not know yet"
        house.here.confirm()
        assert session.old_copies == {before}, "that it is with two"
        after.confirm()
        assert session.old_copies == (set() if raised else {before})
    else:
        before.confirm()
        assert session.old_copies == set()
        assert house.raised == []


async def test_an_old_copy_is_seen_to_when_a_move_of_the_session_is_off(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(old_copies, "AGAIN", 0.0)
    asked: list[bool] = []

    async def is_in() -> bool:
        asked.append(True)
        return len(asked) > 3

    house.copies.old.is_in = is_in
    session = house.session(house.here)
    before, after = house.others(session)
    session.frozen = deque()
    before.handling = None
    house.copies.served(session, after)  # type: ignore[arg-type]
    await soon(lambda: len(asked) > 3, "it is asked until it is known")
    await asyncio.sleep(0)
    assert house.raised == []
    session.frozen = None
    await soon(lambda: house.raised == [session], "its copy counts no more")


async def test_who_has_a_copy_of_a_broken_stream_is_seen_to_when_another_one_has_the_good_copy(house: House) -> None:
    """Else what is stored nowhere would wait for its client to come back."""
    session = house.session(house.here)
    ended = house.here
    session.old_copies, session.link, session.holder = frozenset((ended,)), None, None  # type: ignore[arg-type]
    ended.end()
    house.present.remove(ended)
    house.copies.cover(session)
    await asyncio.sleep(0)
    assert house.raised == [], "that one may still be the only one"
    assert session.holder is not None
    session.holder.confirm()  # type: ignore[attr-defined]
    await soon(lambda: house.raised == [session], "its copy counts no more")
    session.holder.confirm()  # type: ignore[attr-defined]
    assert session.old_copies == set()


@pytest.mark.parametrize("how", ["surrendered", "forgotten", "known too long ago"])
async def test_no_epoch_is_raised_that_others_may_just_be_taking_a_session_over_with(
    house: House, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Or that does not need it any more."""
    monkeypatch.setattr(old_copies, "AGAIN", 0.0)
    asked: list[bool] = []

    async def is_in() -> bool:
        asked.append(True)
        if how == "surrendered":
            session.closed = True
        elif how == "forgotten":
            session.are_forgotten((before,))  # type: ignore[arg-type]
        elif len(asked) == 1:
            monkeypatch.setattr(old_copies, "KNOWN", -1.0)
        return True

    house.copies.old.is_in = is_in
    session = house.session(house.here)
    before, after = house.others(session)
    before.handling = None
    house.copies.served(session, after)  # type: ignore[arg-type]
    if how == "known too long ago":
        await soon(lambda: len(asked) > 2, "it is asked again")
        assert house.raised == []
        monkeypatch.setattr(old_copies, "KNOWN", 1.0)
        await soon(lambda: house.raised == [session], "its copy counts no more")
    else:
        await soon(lambda: bool(asked) and not house.copies.old._asking, "it was asked")
        for _ in range(3):
            await asyncio.sleep(0)
        assert house.raised == []
