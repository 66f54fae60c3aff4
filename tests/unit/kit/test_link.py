"""Links: batches, their bounds, and lanes."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.api.router.v1.router_pb2 import AttachRequest
from tidings.kit.link import (
    CONGESTED,
    MAX_BYTES,
    MAX_ENVELOPES,
    MAX_UNCONFIRMED,
    MAX_WAITING,
    MAX_WAITING_BYTES,
    Lane,
    Outbox,
    Overflow,
    in_order,
)
from tidings.kit.tasks import Tasks


async def sent_by(outbox: Outbox[AttachRequest], until: int) -> list[AttachRequest]:
    """Runs an outbox until it has sent so many envelopes."""
    batches: list[AttachRequest] = []
    done = asyncio.Event()

    async def write(batch: AttachRequest) -> None:
        batches.append(batch)
        if sum(len(one.envelopes) for one in batches) >= until:
            done.set()

    task = asyncio.get_running_loop().create_task(outbox.run(write), name="outbox")
    await asyncio.wait_for(done.wait(), 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return batches


async def test_what_comes_in_one_tick_leaves_in_one_batch() -> None:
    outbox = Outbox(AttachRequest, 0)
    for number in range(100):
        outbox.begin(10).add(number=number)
    (batch,) = await sent_by(outbox, 100)
    assert [envelope.number for envelope in batch.envelopes] == list(range(100))
    assert batch.sequence == 1


async def test_a_batch_is_bounded_in_envelopes_and_bytes_and_order_is_kept() -> None:
    outbox = Outbox(AttachRequest, 0)
    for number in range(2 * MAX_ENVELOPES + 1):
        outbox.begin(10).add(number=number)
    for number in range(2 * MAX_ENVELOPES + 1, 2 * MAX_ENVELOPES + 4):
        outbox.begin(MAX_BYTES // 2 + 1).add(number=number)
    batches = await sent_by(outbox, 2 * MAX_ENVELOPES + 4)
    assert [len(batch.envelopes) for batch in batches] == [512, 512, 2, 1, 1]
    assert [one.number for batch in batches for one in batch.envelopes] == list(range(2 * MAX_ENVELOPES + 4))
    assert [batch.sequence for batch in batches] == [1, 2, 3, 4, 5]


async def test_a_peer_that_takes_nothing_overflows_and_congestion_is_told_before() -> None:
    outbox = Outbox(AttachRequest, 0)
    added = 0
    congested_at = 0
    with pytest.raises(Overflow):
        while True:
            outbox.begin(MAX_BYTES).add(number=added)
            added += 1
            if outbox.congested and not congested_at:
                congested_at = added
    most = MAX_WAITING_BYTES // MAX_BYTES
    assert CONGESTED < congested_at < most
    assert added == most + 1
    relieved = []
    outbox.on_relief = lambda: relieved.append(outbox.congested)
    await sent_by(outbox, added)
    assert relieved == [False], "told once, when it is over"


async def test_a_peer_that_takes_no_small_batches_overflows_too() -> None:
    outbox = Outbox(AttachRequest, 0)
    with pytest.raises(Overflow):
        for _ in range((MAX_WAITING + 2) * MAX_ENVELOPES):
            outbox.begin(1).add()
    unbounded = Outbox(AttachRequest, 0, bounded=False)
    for _ in range((MAX_WAITING + 2) * MAX_ENVELOPES):
        unbounded.begin(1).add()


async def test_a_batch_says_safe_only_of_what_was_dealt_with_when_it_was_full() -> None:
    """The answers to what is dealt with later stand in later batches: a peer that reads "safe" takes what has no
    answer for taken."""
    outbox = Outbox(AttachRequest, 0, resumable=True)
    outbox.safe = 1
    for _ in range(MAX_ENVELOPES + 1):
        outbox.begin(1).add()
    outbox.safe = 2
    first, second = await sent_by(outbox, MAX_ENVELOPES + 1)
    assert (first.safe_through, second.safe_through) == (1, 2)
    outbox.safe = 3
    outbox.resume(0)
    again = await sent_by(outbox, MAX_ENVELOPES + 1)
    assert [batch.safe_through for batch in again] == [1, 2]


async def test_two_peers_whose_windows_are_full_confirm_each_other_nevertheless() -> None:
    ends = [Outbox(AttachRequest, 0, resumable=True) for _ in range(2)]
    got: list[list[int]] = [[], []]
    tasks = Tasks()

    def wire(to: int) -> Any:
        async def write(batch: AttachRequest) -> None:
            other = ends[to]
            other.confirmed(batch.received_through)
            if batch.sequence and other.take(batch.sequence):
                got[to] += [envelope.number for envelope in batch.envelopes]
                other.confirm_soon()

        return write

    count = MAX_UNCONFIRMED + 20
    for outbox in ends:
        for number in range(count):
            outbox.begin(1).add(number=number)
            outbox._close()
    for number, outbox in enumerate(ends):
        tasks.spawn(outbox.run(wire(1 - number)), f"end {number}")
    async with asyncio.timeout(10):
        while [len(one) for one in got] != [count, count]:
            await asyncio.sleep(0.01)
    await tasks.stop()
    assert got == [list(range(count))] * 2


async def test_a_busy_link_sends_at_most_one_batch_an_interval() -> None:
    loop = asyncio.get_running_loop()
    outbox = Outbox(AttachRequest, 0.02)
    times: list[float] = []

    async def write(_batch: AttachRequest) -> None:
        times.append(loop.time())
        if len(times) < 5:
            outbox.begin(1).add()

    outbox.begin(1).add()
    task = loop.create_task(outbox.run(write), name="outbox")
    async with asyncio.timeout(10):
        while len(times) < 5:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert all(later - earlier > 0.015 for earlier, later in pairwise(times))


async def test_an_outbox_that_ends_finishes_the_write_that_is_under_way() -> None:
    """gRPC can't send a call's status in the midst of a write: the peer would wait for it for ever."""
    outbox = Outbox(AttachRequest, 0)
    tasks = Tasks()
    gate, writing, written = asyncio.Event(), asyncio.Event(), []

    async def write(batch: AttachRequest) -> None:
        writing.set()
        await gate.wait()
        written.append(len(batch.envelopes))

    outbox.begin(1).add()
    tasks.spawn(outbox.run(write), "outbox")
    await writing.wait()
    outbox.begin(1).add()
    outbox.end()
    finishing = asyncio.get_running_loop().create_task(tasks.finish(5), name="finish")
    gate.set()
    await finishing
    assert written == [1]
    idle = Outbox(AttachRequest, 0)
    tasks.spawn(idle.run(write), "idle outbox")
    await asyncio.sleep(0)
    idle.end()
    await tasks.finish(5)
    assert len(tasks) == 0


@given(st.lists(st.booleans(), max_size=40))
def test_items_keep_their_place_among_envelopes(kinds: list[bool]) -> None:
    batch = AttachRequest()
    for number, is_item in enumerate(kinds):
        if is_item:
            batch.events.add(stream=number, position=len(batch.envelopes))
        else:
            batch.envelopes.add(number=number)
    order = [
        getattr(one, "stream", None) or getattr(one, "number", 0) for one in in_order(batch.envelopes, batch.events)
    ]
    assert order == list(range(len(kinds)))


async def test_a_lane_runs_at_once_and_lets_later_steps_wait_in_order() -> None:
    tasks = Tasks()
    lane = Lane(tasks.spawn)
    done: list[Any] = []
    gate = asyncio.Event()

    async def slow() -> None:
        await gate.wait()
        done.append("slow")

    def step(value: Any) -> Any:
        if value == "slow":
            return slow()
        done.append(value)
        return None

    lane.run(step, 1)
    assert done == [1]
    lane.run(step, "slow")
    lane.run(step, 2)
    lane.run(step, "slow")
    lane.run(step, 3)
    assert done == [1]
    gate.set()
    await asyncio.wait_for(lane.idle(), 5)
    assert done == [1, "slow", 2, "slow", 3]
    lane.run(step, 4)
    assert done[-1] == 4
    await tasks.stop()


async def test_a_step_that_breaks_does_not_hold_up_those_behind_it() -> None:
    tasks = Tasks()
    lane = Lane(tasks.spawn)
    done: list[int] = []

    async def broken() -> None:
        raise RuntimeError("nobody has foreseen this")

    lane.run(lambda: broken())
    lane.run(done.append, 1)
    lane.run(lambda: broken())
    lane.run(done.append, 2)
    await asyncio.wait_for(lane.idle(), 5)
    assert done == [1, 2]
    await tasks.stop()


async def test_a_long_lane_asks_for_a_pause_and_ends_it() -> None:
    tasks = Tasks()
    lane = Lane(tasks.spawn)
    told: list[str] = []
    lane.on_long = lambda: told.append("long")
    lane.on_short = lambda: told.append("short")
    gate = asyncio.Event()
    lane.run(lambda: gate.wait())  # type: ignore[arg-type, return-value]
    for _ in range(3 * Lane.HIGH):
        lane.run(lambda: None)
    assert told == ["long"]
    gate.set()
    await asyncio.wait_for(lane.idle(), 5)
    assert told == ["long", "short"]
    await tasks.stop()


async def test_what_waits_until_the_peer_has_a_batch_is_called_then_and_in_order() -> None:
    outbox = Outbox(AttachRequest, 0, resumable=True)
    called: list[str] = []
    outbox.when_confirmed(lambda: called.append("nothing was sent"))
    assert called == ["nothing was sent"]
    outbox.begin(10).add(number=1)
    outbox.when_confirmed(lambda: called.append("first"))
    await sent_by(outbox, 1)
    outbox.when_confirmed(lambda: called.append("also in the first"))
    outbox.begin(10).add(number=2)
    outbox.when_confirmed(lambda: called.append("second"))
    outbox.confirmed(1)
    assert called[1:] == ["first", "also in the first"]
    outbox.confirmed(1)
    outbox.when_confirmed(lambda: called.append("also in the second"))
    outbox.release()
    assert called[3:] == ["second", "also in the second"], "a link that is over is waited for no longer"
