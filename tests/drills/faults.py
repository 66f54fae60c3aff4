"""What is done to a cluster. Each function strikes at a random moment, and returns when all runs again or is about to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.drills import scenarios
from tests.drills.drill import UNACKNOWLEDGED, Drill
from tests.drills.population import SHORT
from tidings.testing.server import ONE_PROCESS, PROCESSES, SERVICES

BOTH = (ONE_PROCESS, PROCESSES)


@dataclass(frozen=True)
class Kind:
    """A fault, and what the plan of a life must know of it."""

    name: str
    # What dies: its value in the fault matrix.
    dies: str
    strike: Callable[[Drill], Awaitable[None]]
    # About how many seconds it takes.
    seconds: float
    ways: tuple[str, ...] = BOTH
    # It needs a network that can be cut.
    networked: bool = False
    # It may last a minute (LONG=1).
    minute: bool = False


def kill(service: str) -> Callable[[Drill], Awaitable[None]]:
    async def strike(drill: Drill) -> None:
        """kill -9, and a start again some seconds later."""
        node = drill.node()
        async with drill.broken(f"kill {service or 'node'}", lambda: drill.cluster.kill(node, service)):
            await drill.pause(0.3, 2.0)
            drill.cluster.start_again(node)
            await drill.pause(2.0, 2.5)

    return strike


async def kill_again(drill: Drill) -> None:
    """The same again 10 s later elsewhere."""
    first = drill.node()
    async with drill.broken("kill node", lambda: drill.cluster.kill(first)):
        await drill.pause(0.3, 2.0)
        drill.cluster.start_again(first)
    await drill.pause(9.0, 9.5)
    second = drill.node(first)
    async with drill.broken("kill node again", lambda: drill.cluster.kill(second)):
        await drill.pause(0.3, 2.0)
        drill.cluster.start_again(second)
        await drill.pause(2.0, 2.5)


async def hang(drill: Drill) -> None:
    """SIGSTOP to a node, for longer than its lease."""
    node = drill.node()
    async with drill.broken("hang node", lambda: drill.cluster.hang(node)):
        await drill.pause(drill.minute(7.0), drill.minute(7.0) + 1)
        drill.cluster.wake()
        await drill.pause(1.0, 2.0)


async def cut(drill: Drill) -> None:
    """Nothing passes between two nodes, and then it does again."""
    one = drill.node()
    other = drill.node(one)
    async with drill.broken("cut network", lambda: drill.cluster.cut(one, other)):
        await drill.pause(drill.minute(7.0), drill.minute(7.0) + 1)
        drill.cluster.heal(one, other)
        await drill.pause(2.0, 2.5)


async def cut_for_a_moment(drill: Drill) -> None:
    """Long enough for connections to break (2 s without an acknowledgement), too short for anybody to be put out (5 s
    after somebody was missed): all streams go on where they were."""
    one = drill.node()
    other = drill.node(one)
    async with drill.broken("cut for a moment", lambda: drill.cluster.cut(one, other)):
        await drill.pause(2.6, 3.2)
        drill.cluster.heal(one, other)
        await drill.pause(2.0, 2.5)


async def hang_router(drill: Drill) -> None:
    """Its sessions are others' when it wakes, and then the time is over of those that it believes to wait."""
    node = drill.node()
    async with drill.broken("hang router", lambda: drill.cluster.hang(node, "router")):
        await drill.pause(3.5, 4.5)
        drill.cluster.wake()
        await drill.pause(SHORT + 1.0, SHORT + 2.0)


async def restart_database(drill: Drill) -> None:
    async with drill.broken("restart database", drill.cluster.mariadb.kill):
        await asyncio.to_thread(drill.cluster.mariadb.start)
        await drill.pause(1.0, 2.0)


async def database_away(drill: Drill) -> None:
    async with drill.broken("database away", drill.cluster.mariadb.kill):
        await drill.pause(drill.minute(3.5), drill.minute(3.5) + 1)
        await asyncio.to_thread(drill.cluster.mariadb.start)
        await drill.pause(1.0, 2.0)


async def drain(drill: Drill) -> None:
    """A node is restarted in order; in long drills one after the other."""
    for node in range(3) if drill.long else [drill.node()]:
        async with drill.broken("drain node", lambda node=node: drill.cluster.drain(node)):  # type: ignore[misc]
            if not await drill.until(lambda node=node: drill.cluster.left(node), 40.0):  # type: ignore[misc]
                drill.complaints.append(f"node {node + 1} did not end within 40 s of its SIGTERM")
                drill.cluster.kill(node)
            drill.cluster.start_again(node)
            await drill.cluster.serve()


async def cut_clients(drill: Drill) -> None:
    """Half of the clients lose their connections, each at some byte, in or out."""
    working = drill.population.working()
    chosen = drill.random.sample(working, len(working) // 2)

    def strike() -> None:
        for client in chosen:
            place = drill.random.randrange(1500)
            client.cut_after(**{drill.random.choice(["received", "sent"]): place})
        # These are the bytes among which they are cut.
        drill.population.burst(UNACKNOWLEDGED)

    async with drill.broken("cut clients", strike):
        await drill.pause(2.0, 3.0)


# A session is held by its connector, by its router, and by their host: each of these takes one of its holders away.
HOLDERS = ("router", "connector", "node", "hung node", "restart")
DIES = (*SERVICES, "node", "hung node", "network", "database", "restart", "client")
KINDS = (
    *(Kind(f"kill {service}", service, kill(service), 5.0, (PROCESSES,)) for service in SERVICES),
    Kind("kill node", "node", kill(""), 6.0),
    Kind("kill node again", "node", kill_again, 14.0),
    Kind("hang node", "hung node", hang, 10.0, minute=True),
    Kind("cut network", "network", cut, 11.0, networked=True, minute=True),
    Kind("cut for a moment", "network", cut_for_a_moment, 8.0, networked=True),
    Kind("hang router", "hung node", hang_router, 12.0, (PROCESSES,)),
    Kind("restart database", "database", restart_database, 5.0),
    Kind("database away", "database", database_away, 6.0, minute=True),
    Kind("drain node", "restart", drain, 8.0),
    Kind("cut clients", "client", cut_clients, 4.0),
    # Each of these was seen at a peer.
    Kind("vanish, then kill", "node", scenarios.clients_vanish_before_the_kill, 9.0),
    Kind("cut in a body", "client", scenarios.a_stream_is_cut_inside_a_body, 4.0),
    Kind("to the dead", "node", scenarios.messages_to_a_node_that_has_just_died, 6.0),
    Kind("backlog moves", "restart", scenarios.a_session_moves_with_its_backlog, 9.0),
    Kind("second device", "client", scenarios.the_first_of_two_devices_is_cut, 4.0),
    Kind("log-in under fire", "client", scenarios.a_log_in_while_messages_come, 4.0),
    Kind("stored, then kill", "node", scenarios.stored_just_before_the_kill, 8.0),
    Kind("no commit, then kill", "node", scenarios.a_kill_while_the_database_stands_still, 8.0),
    Kind("hung between", "hung node", scenarios.one_hung_node_between_two_others, 13.0, minute=True),
    Kind("killed for good", "node", scenarios.contacts_of_those_who_died_with_their_node, 10.0),
    Kind("old copies", "router", scenarios.an_old_copy_comes_back, 9.0, (PROCESSES,)),
    Kind("owner wakes", "hung node", scenarios.the_hung_owner_wakes_after_a_take_over, 9.0),
)
