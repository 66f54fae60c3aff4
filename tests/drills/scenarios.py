"""What was seen to go wrong at other servers, as named cases. The checker judges most of them; the rest complains."""

from __future__ import annotations

import asyncio

from tests.drills.client import Client
from tests.drills.drill import Drill
from tests.drills.history import Received, Saw, Sent
from tests.drills.population import SHORT

# Seconds that a message between two nodes may take while a third one hangs.
HELD_UP = 10.0
# Seconds that a log-in may take where others compute.
LOGGED_IN = 10.0
# Seconds behind its time within which contacts see that somebody is gone.
SEEN_WITHIN = 14.0


def _at(drill: Drill, node: int) -> list[Client]:
    """The clients whose connections end at a node."""
    return [client for client in drill.population.working() if client.at % drill.cluster.nodes == node]


async def _start_again(drill: Drill, node: int) -> None:
    await drill.pause(0.3, 1.5)
    drill.cluster.start_again(node)
    await drill.pause(2.0, 2.5)


async def clients_vanish_before_the_kill(drill: Drill) -> None:
    """Their sessions wait for them, and what comes for them meanwhile waits in the node that dies."""
    node = drill.node()
    vanished = _at(drill, node)[:6]
    for number, client in enumerate(vanished):
        client.vanish(silently=bool(number % 2))
    await drill.pause(2.0, 4.0)
    async with drill.broken("vanish, then kill", lambda: drill.cluster.kill(node)):
        await _start_again(drill, node)
    for client in vanished:
        client.call_back()


async def a_stream_is_cut_inside_a_body(drill: Drill) -> None:
    """And is then resumed: a session that goes deaf, because the old parser is fed on, loses all that follows."""
    chosen = drill.population.working()[::2]

    def strike() -> None:
        for number, client in enumerate(chosen):
            # Both are inside the body of a message: it begins behind some 90 bytes, and is longer than these.
            if number % 2:
                client.cut_after(sent=drill.random.randrange(120, 200))
                client.send(drill.population.singles[0].jid, size=400)
            else:
                client.cut_after(received=drill.random.randrange(120, 200))

    async with drill.broken("cut in a body", strike):
        for client in chosen:
            drill.population.singles[1].send(client.jid, size=400)
        await drill.pause(1.5, 2.0)
    for client in chosen:
        if client.works:
            client.send(drill.population.singles[1].jid)


async def messages_to_a_node_that_has_just_died(drill: Drill) -> None:
    """Before the others know, its sessions look alive."""
    node = drill.node()
    dead = _at(drill, node)
    async with drill.broken("to the dead", lambda: drill.cluster.kill(node)):
        for _ in range(10):
            for client in drill.population.working():
                if client.at % drill.cluster.nodes != node and dead:
                    client.send(drill.random.choice(dead).jid)
            await asyncio.sleep(0.05)
        await _start_again(drill, node)


async def a_session_moves_with_its_backlog(drill: Drill) -> None:
    """Clients that do not read have a backlog; the node leaves and joins, and their sessions go from router to router."""
    node = drill.node()
    slow = [client for client in drill.population.working() if client.at % drill.cluster.nodes != node][:5]
    for client in slow:
        client.read(False)
    async with drill.broken("backlog moves", lambda: drill.cluster.drain(node)):
        await drill.until(lambda: drill.cluster.left(node), 20.0)
        drill.cluster.start_again(node)
        await drill.pause(1.5, 2.0)
        for client in slow:
            client.read(True)
        await drill.cluster.serve()
        await drill.pause(1.0, 1.5)


async def the_first_of_two_devices_is_cut(drill: Drill) -> None:
    """The second one has had what was sent to both."""
    firsts = [first for first, _ in drill.population.pairs]

    def strike() -> None:
        for client in firsts:
            client.vanish()

    writers = drill.population.singles
    async with drill.broken("second device", strike):
        for _ in range(20):
            for first in firsts:
                drill.random.choice(writers).send(first.account)
            await asyncio.sleep(0.05)
        await drill.pause(0.5, 1.0)
    for client in firsts:
        client.call_back()


async def a_log_in_while_messages_come(drill: Drill) -> None:
    """Stored messages wait for those who were away, and live ones come at the moment of their log-in."""
    chosen = [client for client in drill.population.singles if client.works][:6]
    writers = [client for client in drill.population.working() if client not in chosen][:12]

    async def fire(times: int) -> None:
        for _ in range(times):
            for client in writers:
                # By a full JID it is the new session's before that is available.
                to = drill.random.choice(chosen)
                client.send(drill.random.choice([to.jid, to.account]))
            await asyncio.sleep(0.02)

    for client in chosen:
        await client.close()
    await fire(50)

    def strike() -> None:
        for client in chosen:
            client.call_back()
            client.start()

    async with drill.broken("log-in under fire", strike):
        deadline = drill.history.now() + LOGGED_IN
        while not all(client.works for client in chosen) and drill.history.now() < deadline:
            await fire(5)
        await fire(50)


async def stored_just_before_the_kill(drill: Drill) -> None:
    """What was stored in the last 5 s before the kill is still stored."""
    node = drill.node()
    for _ in range(100):
        client = drill.random.choice(drill.population.working() or [drill.population.singles[0]])
        client.send(drill.random.choice(drill.population.offline))
        await asyncio.sleep(0.04)
    async with drill.broken("stored, then kill", lambda: drill.cluster.kill(node)):
        await _start_again(drill, node)


async def a_kill_while_the_database_stands_still(drill: Drill) -> None:
    """What waits for its commit is not safe, however long that takes: whoever dies with it has not said that it is."""
    singles = drill.population.singles
    await drill.until(lambda: any(client.works for client in singles), LOGGED_IN)
    # What those write who are at the node that dies waits there alone: there should be some.
    there = {node: [one for one in _at(drill, node) if one in singles] for node in range(drill.cluster.nodes)}
    node = drill.random.choice(
        [node for node in there if len(there[node]) > 1] or [node for node in there if there[node]]
    )
    # Half of those there have walked out of reach, and nobody knows yet.
    vanished = there[node][::2]
    writers = [client for client in drill.population.working() if client not in vanished]
    for client in vanished:
        client.vanish(silently=True)
    drill.cluster.mariadb.hang()
    try:
        for _ in range(20):
            for client in writers:
                client.send(drill.random.choice(vanished).jid)
                if client in there[node]:
                    # Of what is for somebody who is away there is no copy elsewhere.
                    client.send(drill.random.choice(drill.population.offline))
            await asyncio.sleep(0.04)
        # Long enough for every client to ask what is safe by now.
        await drill.pause(0.6, 0.9)
        async with drill.broken("no commit, then kill", lambda: drill.cluster.kill(node)):
            drill.cluster.mariadb.go_on()
            await _start_again(drill, node)
    finally:
        drill.cluster.mariadb.go_on()
    for client in vanished:
        client.call_back()


async def one_hung_node_between_two_others(drill: Drill) -> None:
    """It does not hold up what the others have to do with each other."""
    node, others = _with_others(drill)
    seconds = drill.minute(11.0)
    async with drill.broken("hung between", lambda: drill.cluster.hang(node)):
        began = drill.history.now()
        while drill.history.now() < began + seconds:
            one, other = drill.random.sample(others, 2)
            one.send(other.jid)
            await asyncio.sleep(0.04)
        drill.cluster.wake()
        await drill.pause(1.0, 1.5)
    still = {client.jid for client in others if not any(at > began for at, _ in client.pauses)}
    if waited := _slowest(drill, still, began):
        drill.complaints.append(f"held up for {waited:.1f} s while node {node + 1} hung, between {sorted(still)}")


def _with_others(drill: Drill) -> tuple[int, list[Client]]:
    """A node, and clients that are not at it, two at least: all may have come to be at two nodes, or at one."""
    first = drill.node()
    for node in ((first + step) % drill.cluster.nodes for step in range(drill.cluster.nodes)):
        # What goes to an account waits for those of its devices that may come back.
        concerned = {client.account for client in _at(drill, node)}
        others = [client for client in drill.population.working() if client.account not in concerned]
        if len(others) > 1:
            return node, others
    raise AssertionError("fewer than two clients are online")


def _slowest(drill: Drill, jids: set[str], since: float) -> float:
    """The longest way of a message between clients that had their streams all the time, if it is over the limit."""
    sent: dict[str, float] = {}
    slowest = 0.0
    for event in drill.history:
        if isinstance(event, Sent) and event.at > since and event.to in jids:
            if event.session.partition("#")[0] in jids:
                sent[event.key] = event.at
        elif isinstance(event, Received) and event.key in sent:
            slowest = max(slowest, event.at - sent.pop(event.key))
    return slowest if slowest > HELD_UP else 0.0


async def contacts_of_those_who_died_with_their_node(drill: Drill) -> None:
    """They see unavailable, once."""
    mortals = [client for client in drill.population.mortals if client.works]
    if not mortals:
        return
    node = mortals[0].at % drill.cluster.nodes
    gone = [client for client in mortals if client.at % drill.cluster.nodes == node]

    def strike() -> None:
        for client in gone:
            client.vanish()
        drill.cluster.kill(node)

    async with drill.broken("killed for good", strike):
        struck = drill.history.now()
        await _start_again(drill, node)
    await drill.until(lambda: _all_see(drill, gone, struck), SHORT + SEEN_WITHIN)
    for client in gone:
        client.call_back()


def _all_see(drill: Drill, gone: list[Client], since: float) -> bool:
    """Whether each watcher who saw one of them come has seen it go."""
    watching = {watcher.session for watcher in drill.population.watchers if watcher.session}
    jids = {client.jid for client in gone}
    last: dict[tuple[str, str], bool] = {}
    for event in drill.history:
        if isinstance(event, Saw) and event.session in watching and event.of in jids:
            last[event.session, event.of] = event.available
    return not any(last.values()) and drill.history.now() > since + SHORT


async def the_hung_owner_wakes_after_a_take_over(drill: Drill) -> None:
    """SIGSTOP the owner, resume elsewhere, SIGCONT: who wakes says nothing, and takes nothing any more."""
    node = drill.node()
    held = _at(drill, node)
    async with drill.broken("owner wakes", lambda: drill.cluster.hang(node)):
        for client in held:
            client.drop()
            client.at = (node + 1) % drill.cluster.nodes
        # Three seconds: a take-over (2 s), but no lease.
        await drill.pause(3.0, 4.5)
        drill.cluster.wake()
        await drill.pause(1.0, 2.0)


async def an_old_copy_comes_back(drill: Drill) -> None:
    """Clients resume elsewhere while their connector hangs; when it wakes their router has just died, and it brings
    copies of their sessions that have grown old."""
    node = drill.node()
    held = _at(drill, node)

    def strike() -> None:
        drill.cluster.kill(node, "router")
        drill.cluster.wake()

    drill.cluster.hang(node, "connector")
    for client in held:
        client.drop()
        client.at = (node + 1) % drill.cluster.nodes
    await drill.until(lambda: all(client.works for client in held), 3.0)
    async with drill.broken("old copies", strike):
        await drill.pause(2.0, 3.0)
        drill.cluster.start_again(node)
        await drill.pause(2.0, 2.5)
