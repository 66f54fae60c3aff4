"""Routers and connectors as processes of one machine: what runs where, and what becomes of one that dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tidings.kit.options import OptionError, load
from tidings.kit.supervisor import Child, ChildSpec, Supervisor, plan, process_count

SERVICES = ("registry", "router", "pubsub", "weather", "connector")


def planned(count: int, *arguments: str) -> list[ChildSpec]:
    return plan(load(arguments, {}), count, "m.example", "192.0.2.1", SERVICES)


# --- what to run ---


@pytest.mark.parametrize(
    ("count", "routers"), [(2, 1), (3, 1), (4, 1), (6, 1), (7, 2), (9, 2), (12, 3), (16, 4), (32, 7), (64, 14)]
)
def test_there_is_one_router_for_three_or_four_connectors(count: int, routers: int) -> None:
    specs = planned(count)
    assert len(specs) == count
    assert [spec.services for spec in specs] == [
        *[("registry", "router", "pubsub", "weather")] * routers,
        *[("connector",)] * (count - routers),
    ]


def test_each_process_is_a_node_with_names_and_ports_of_its_own() -> None:
    specs = planned(7, "--cluster-port=6000", "--admin-port=7000", "--registry=192.0.2.9:1")
    options = [spec.options for spec in specs]
    assert [one["cluster-hostname"] for one in options] == [
        *("router1.m.example", "router2.m.example"),
        *(f"connector{number}.m.example" for number in range(1, 6)),
    ]
    assert [one["cluster-port"] for one in options] == list(range(6000, 6007))
    assert [one["admin-port"] for one in options] == list(range(7000, 7007))
    assert {one["cluster-address"] for one in options} == {"192.0.2.1"}
    assert all(one["c2s-reuse-port"] for one in options)
    assert [one["registry"] for one in options] == [
        *[["192.0.2.9:1"]] * 2,
        *[["127.0.0.1:6000", "127.0.0.1:6001", "192.0.2.9:1"]] * 5,
    ]
    assert {one["admin-port"] for one in (spec.options for spec in planned(3, "--admin-port=0"))} == {0}
    assert planned(2, "--bind-address=2001:db8::1")[1].options["registry"] == ["[2001:db8::1]:5777"]


def test_a_process_has_the_options_of_all_wherever_they_came_from(tmp_path: Path) -> None:
    file = tmp_path / "init.properties"
    file.write_text(
        "--cluster-port=6000\n--virt-hosts=example.org\n--processes=3\n--cluster-secret=not-for-everybody-to-see\n"
    )
    environment = {"TIDINGS_ADMIN_PORT": "7000", "TIDINGS_USER_DB_URI": "mysql://u:hidden@h/d"}
    options = load([f"--config={file}", "--registration[example.org]=true"], environment)
    child = plan(options, 3, "m.example", "192.0.2.1", SERVICES)[2].options
    arguments = child.arguments()
    assert not [text for text in arguments if "everybody" in text or "hidden" in text]
    again = load(arguments, child.secrets())
    for name in ("virt-hosts", "cluster-secret", "user-db-uri", "processes", "cluster-hostname"):
        assert again[name] == child[name]
    assert again.for_host("example.org", "registration") is True
    assert (again["cluster-port"], again["admin-port"], again["processes"], again["config"]) == (6002, 7002, "1", [])


def test_auto_is_a_process_for_each_core_and_one_is_the_default() -> None:
    assert process_count(load(["--processes=auto"], {}), []) == len(os.sched_getaffinity(0))
    assert process_count(load([], {}), []) == 1
    assert process_count(load([], {}), ["router"]) == 1


@pytest.mark.parametrize(
    ("arguments", "names", "said"),
    [
        (["--processes=2"], ["router"], "leave out router, or set --processes=1"),
        (["--processes=auto"], ["registry", "router"], "leave out registry router"),
        (["--processes=0"], [], "a number from 1 to 64"),
        (["--processes=65"], [], "a number from 1 to 64"),
        (["--processes=all"], [], "say auto"),
        (["--processes=2", "--cluster-tls-cert-file=a"], [], "made out to one"),
        (["--processes=2", "--cluster-port=0"], [], "a port above 0"),
    ],
)
def test_what_can_not_work_is_refused_with_what_to_do(arguments: list[str], names: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        process_count(load(arguments, {}), names)


# --- watching ---


class Toy:
    """A process that does what a test says, and ends when it is told to (if it is `obedient`)."""

    def __init__(self, obedient: bool = True) -> None:
        self.obedient = obedient
        self.signals: list[signal.Signals] = []
        self._serves: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serves(self) -> bool:
        await asyncio.wait((self._serves, self._code), return_when=asyncio.FIRST_COMPLETED)
        return self._serves.done()

    async def ended(self) -> int:
        return await asyncio.shield(self._code)

    def send(self, number: signal.Signals) -> None:
        self.signals.append(number)
        if number is signal.SIGKILL:
            self.end(-9)
        elif self.obedient:
            self.end(0)

    def serve(self) -> None:
        self._serves.set_result(True)

    def end(self, code: int) -> None:
        if not self._code.done():
            self._code.set_result(code)


class Machine:
    """A supervisor of toys, whose time passes only when it or a test says so."""

    def __init__(self, count: int = 3, drain_timeout: float = 10.0) -> None:
        self.started: dict[str, list[Toy]] = {}
        self.order: list[str] = []
        self.obedient = True
        self.impossible = ""
        self.now = 0.0
        self.pauses: list[float] = []
        self.readies = 0
        self.ready_error: Exception | None = None
        self.supervisor = Supervisor(
            planned(count), self.spawn, self.ready, drain_timeout, lambda: self.now, self.sleep
        )
        self.task = asyncio.create_task(self.supervisor.run())

    async def spawn(self, spec: ChildSpec) -> Child:
        if spec.name == self.impossible:
            raise BlockingIOError("no more processes")
        toy = Toy(self.obedient)
        self.started.setdefault(spec.name, []).append(toy)
        send = toy.send

        def noted(number: signal.Signals) -> None:
            self.order.append(f"{number.name} {spec.name}")
            send(number)

        toy.send = noted  # type: ignore[method-assign]
        return toy

    async def ready(self) -> None:
        self.readies += 1
        if self.ready_error is not None:
            raise self.ready_error

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    async def all_serve(self) -> None:
        await settle()
        for toys in self.started.values():
            toys[-1].serve()
        await settle()

    async def die(self, name: str, code: int = -9, after: float = 1.0, serves: bool = True) -> None:
        """The present process of that name ends; it has served so many seconds."""
        toy = self.started[name][-1]
        if serves and not toy._serves.done():
            toy.serve()
            await settle()
        self.now += after
        toy.end(code)
        await settle()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_ready_is_said_once_when_all_serve() -> None:
    machine = Machine()
    await settle()
    for number, toys in enumerate(machine.started.values()):
        assert machine.readies == 0, number
        toys[-1].serve()
        await settle()
    assert machine.readies == 1
    await machine.die("connector1")
    machine.started["connector1"][-1].serve()
    await settle()
    assert machine.readies == 1
    machine.supervisor.told()
    assert await machine.task == 0


async def test_a_died_process_is_started_again_with_a_growing_pause() -> None:
    machine = Machine()
    await machine.all_serve()
    for _ in range(9):
        await machine.die("router1")
    assert machine.pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(machine.started["router1"]) == 10
    assert [len(machine.started[name]) for name in ("connector1", "connector2")] == [1, 1]
    machine.supervisor.told()
    assert await machine.task == 0


async def test_pauses_begin_anew_after_a_minute_of_service() -> None:
    machine = Machine()
    await machine.all_serve()
    for after in (1.0, 1.0, 59.0, 60.0, 1.0):
        await machine.die("router1", after=after)
    assert machine.pauses == [0.5, 1, 2, 0.5, 1]
    # Time without service is none of it.
    await machine.die("router1", 1, after=100.0, serves=False)
    assert machine.pauses[-1] == 2
    machine.supervisor.told()
    assert await machine.task == 0


async def test_a_process_that_never_served_stops_all_with_its_exit_code() -> None:
    machine = Machine()
    await settle()
    machine.started["router1"][0].serve()
    await settle()
    machine.started["connector1"][0].end(3)
    assert await machine.task == 3
    assert machine.pauses == []
    assert machine.order == ["SIGTERM connector2", "SIGTERM router1"]


async def test_a_signal_before_service_is_an_exit_code_of_one() -> None:
    machine = Machine()
    await settle()
    machine.started["connector1"][0].end(-11)
    assert await machine.task == 1


async def test_wrong_options_stop_all_also_later() -> None:
    machine = Machine()
    await machine.all_serve()
    await machine.die("connector1", 2)
    assert await machine.task == 2


async def test_a_process_that_was_told_to_leave_stays_away_and_the_last_one_ends_all() -> None:
    machine = Machine()
    await machine.all_serve()
    await machine.die("connector1", 0)
    await machine.die("connector2", 0)
    assert (machine.pauses, machine.task.done()) == ([], False)
    await machine.die("router1", 0)
    assert await machine.task == 0


async def test_connectors_stop_before_routers() -> None:
    machine = Machine(7)
    await machine.all_serve()
    for toys in machine.started.values():
        toys[-1].obedient = False
    machine.supervisor.told()
    await settle()
    assert machine.order == [f"SIGTERM connector{number}" for number in range(1, 6)]
    for number in range(1, 6):
        assert machine.started["router1"][0].signals == []
        machine.started[f"connector{number}"][0].end(0)
        await settle()
    assert machine.order[5:] == ["SIGTERM router1", "SIGTERM router2"]
    machine.started["router1"][0].end(0)
    await settle()
    assert not machine.task.done()
    machine.started["router2"][0].end(0)
    assert await machine.task == 0


async def test_who_does_not_stop_in_time_is_killed() -> None:
    machine = Machine(drain_timeout=0.1)
    await machine.all_serve()
    machine.started["connector1"][0].obedient = False
    machine.started["router1"][0].obedient = False
    machine.supervisor.told()
    assert await machine.task == 0
    assert machine.started["connector1"][0].signals == [signal.SIGTERM, signal.SIGKILL]
    assert machine.started["router1"][0].signals == [signal.SIGTERM, signal.SIGKILL]


async def test_a_second_signal_kills_at_once() -> None:
    machine = Machine(drain_timeout=60.0)
    machine.obedient = False
    await machine.all_serve()
    machine.supervisor.told()
    await settle()
    machine.supervisor.told()
    assert await machine.task == 1
    for toys in machine.started.values():
        assert signal.SIGKILL in toys[0].signals


async def test_nothing_is_started_again_while_all_stop() -> None:
    machine = Machine()
    await machine.all_serve()
    machine.started["router1"][0].obedient = False
    machine.supervisor.told()
    await settle()
    await machine.die("router1", -9)
    assert await machine.task == 0
    assert [len(toys) for toys in machine.started.values()] == [1, 1, 1]


@pytest.mark.parametrize("error", [RuntimeError("no account"), OSError("no process")])
async def test_what_fails_once_all_serve_stops_all_and_is_told(error: Exception) -> None:
    machine = Machine()
    machine.ready_error = error
    await machine.all_serve()
    with pytest.raises(type(error), match=str(error)):
        await machine.task
    assert [toys[0].signals for toys in machine.started.values()] == [[signal.SIGTERM]] * 3


async def test_a_process_that_can_not_even_be_made_stops_all() -> None:
    machine = Machine()
    machine.impossible = "connector2"
    with pytest.raises(BlockingIOError):
        await machine.task
    assert machine.order == ["SIGTERM connector1", "SIGTERM router1"]
