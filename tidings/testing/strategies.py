"""The contract of a strategy as a suite: whoever writes one runs this over it.

    @pytest.mark.parametrize("scenario", SCENARIOS)
    @pytest.mark.parametrize("seed", range(10))
    def test_my_strategy(scenario, seed):
        run(MyStrategy, scenario, seed)

Several routers are simulated, each with the real forwarding (`tidings.cluster.forwarding`) and one instance of
the strategy, over a network that delays, doubles, reorders and drops; views reach the routers up to ten
seconds apart, and sessions are handed over step by step, so that for a while two routers have each. Accounts
send each other numbered messages while routers join, leave, crash, come back and stand still, and clients come
back elsewhere. In the end: each message of a router that lived was delivered or is stored, no session has one
twice, order is kept from each sender to each session, nothing went round and round, and once all is quiet a
message reaches whoever is there at once. Time is simulated: a run takes some hundred milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tidings.cluster.strategy import Factory
from tidings.testing.simulation import VIEW_LAG, World


@dataclass
class Report:
    """What a run has seen."""

    messages: int = 0
    delivered: int = 0
    stored: int = 0
    # Copies between routers while nothing changed, for each message of that time; notes of the strategy in all.
    copies_per_message: float = 0.0
    notes: int = 0


# --- scenarios ---

ACCOUNTS = [f"user{number}@example.org" for number in range(6)]


def _people(world: World) -> None:
    for account in ACCOUNTS[:5]:
        for resource in ("phone", "desk")[: world.random.randint(1, 2)]:
            world.log_in(account, resource)


def _chatter(world: World, seconds: float, rate: float = 40.0) -> None:
    """Everybody writes to everybody, to bare and to full JIDs, also to who is not there."""
    end = world.now + seconds

    def speak() -> None:
        if world.table:
            sender = world.random.choice(sorted(world.table))
            to = world.random.choice([*ACCOUNTS, *sorted(world.table)])
            if to.partition("/")[0] != sender.partition("/")[0]:
                world.say(sender, to)
        if world.now < end:
            world.later(world.random.expovariate(rate), speak)

    world.later(0, speak)


def _quiet(world: World) -> None:
    _chatter(world, 10)


def _join(world: World) -> None:
    _chatter(world, 30)
    world.later(5, lambda: world.start("n4"))


def _leave(world: World) -> None:
    _chatter(world, 40)
    world.later(3, lambda: world.drain("n2"))
    world.later(25, lambda: world.gone("n2", crash=False))


def _crash(world: World) -> None:
    _chatter(world, 30)
    world.later(5, lambda: world.gone("n2", crash=True))


def _fast_restart(world: World) -> None:
    def restart() -> None:
        world.gone("n2", crash=True)
        world.start("n2")

    _chatter(world, 30)
    world.later(5, restart)


def _log_ins(world: World) -> None:
    _chatter(world, 20)
    for number in range(20):
        account = ACCOUNTS[number % 6]
        world.later(1 + number / 2, lambda account=account, n=number: world.log_in(account, f"extra{n}"))  # type: ignore[misc]
        world.later(4 + number / 2, lambda account=account, n=number: world.log_out(f"{account}/extra{n}"))  # type: ignore[misc]


def _come_back(world: World) -> None:
    _chatter(world, 20, 200.0)
    jids = sorted(world.table)
    for number in range(40):
        jid, after = jids[number % len(jids)], world.random.uniform(0, 0.4)
        world.later(1 + number / 2.5, lambda jid=jid, after=after: world.come_back(jid, after))  # type: ignore[misc]


def _still(world: World) -> None:
    _chatter(world, 30, 100.0)
    for number, name in enumerate(("n1", "n2", "n3", "n1")):
        world.later(3 + 6 * number, lambda name=name: world.stand_still(name, world.random.uniform(0.5, 4)))  # type: ignore[misc]


def _everything(world: World) -> None:
    _chatter(world, 60)
    world.later(3, lambda: world.start("n4"))
    world.later(12, lambda: world.drain("n1"))
    world.later(14, lambda: world.start("n5"))
    world.later(40, lambda: world.gone("n1", crash=False))
    world.later(45, lambda: world.gone("n3", crash=True))


SCENARIOS: dict[str, Callable[[World], None]] = {
    "quiet": _quiet,
    "a router joins": _join,
    "a router leaves": _leave,
    "a router crashes": _crash,
    "a fast restart under the same name": _fast_restart,
    "log-ins and log-outs": _log_ins,
    "clients come back elsewhere": _come_back,
    "a router stands still": _still,
    "all at once": _everything,
}


def run(factory: Factory, scenario: str, seed: int) -> Report:
    """Plays one scenario. Raises AssertionError with what the strategy got wrong."""
    world = World(factory, seed)
    world.late_views = 0.0
    for name in ("n1", "n2", "n3"):
        world.start(name)
        world.run(world.now + 1)
    _people(world)
    world.run(world.now + 2)
    world.late_views = VIEW_LAG
    SCENARIOS[scenario](world)
    world.run(world.now + 120)
    _judge(world)
    return _settle(world)


def _settle(world: World) -> Report:
    """Once all is quiet, each message reaches all who are there, and copies can be counted."""
    notes, doubles, asked = world.notes, world.doubles, world.asked
    before = {id(session): len(session.got) for session in world.sessions}
    hops = sum(world.hops.values())
    senders = sorted(world.table)
    sent = 0
    for sender in senders:
        for account in sorted({jid.partition("/")[0] for jid in senders} - {sender.partition("/")[0]}):
            world.say(sender, account)
            sent += 1
    world.run(world.now + 60)
    for jid in senders:
        session = world.table[jid][1]
        wanted = sum(1 for sender in senders if sender.partition("/")[0] != session.account)
        got = len(session.got) - before[id(session)]
        assert got == wanted, f"when all was quiet {jid} got {got} of {wanted} messages"
    assert world.doubles == doubles, "when all was quiet messages came twice to a session"
    assert world.asked == asked, "when all was quiet the table of sessions had to say where somebody was"
    _judge(world)
    return Report(
        messages=len(world.sent),
        delivered=sum(len(session.got) for session in world.sessions),
        stored=sum(map(len, world.store.values())),
        copies_per_message=(sum(world.hops.values()) - hops) / max(1, sent),
        notes=notes,
    )


def _judge(world: World) -> None:
    """No loss, no double, order."""
    delivered: set[tuple[str, int]] = set()
    for session in world.sessions:
        jid = f"{session.account}/{session.resource}"
        last: dict[str, int] = {}
        for sender, number in session.got:
            assert number > last.get(sender, 0), f"{jid} got message {number} of {sender} " + (
                "twice" if number == last[sender] else f"after {last[sender]}"
            )
            last[sender] = number
        delivered.update(session.got)
    for stored in world.store.values():
        delivered.update((message.sender, message.number) for message in stored)
    for message in world.sent:
        name = (message.sender, message.number)
        assert name in delivered or name in world.excused, f"message {name} to {message.to} is lost"
