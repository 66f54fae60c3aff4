"""Fixtures for all tests: an installation in each of the three ways of running, and the databases."""

from __future__ import annotations

import shutil
import signal
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis  # here, for CPython 3.11 can fail in its import at the end of a run of many processes
import pytest

from tidings.kit.database_url import DatabaseUrl, parse
from tidings.kit.db import Database
from tidings.testing.galera import PROVIDER, Galera
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import ONE_PROCESS, WAYS, Installation

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("tidings", deadline=None)
hypothesis.settings.load_profile("tidings")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--way",
        choices=WAYS,
        default=ONE_PROCESS,
        help="how the installation runs: in one process, in one that dials itself, or one process for each service",
    )
    parser.addoption(
        "--database",
        choices=("sqlite", "mysql", "galera"),
        default="sqlite",
        help="the database of the installation",
    )
    parser.addoption("--nodes", type=int, default=1, help="how many nodes, each client on the next one; needs mysql")
    parser.addoption("--strategy", default="", help="how its routers share users")
    parser.addoption("--loop", choices=("auto", "uvloop", "asyncio"), default="auto", help="its event loop")


def pytest_report_header(config: pytest.Config) -> str:
    shown = ("way", "database", "nodes", "strategy")
    return "tidings: " + ", ".join(f"{name}={config.getoption('--' + name) or 'default'}" for name in shown)


@pytest.fixture(scope="session")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--way"))


@pytest.fixture(scope="session")
def installation(
    way: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """One installation for all tests that do not break it."""
    uri = ""
    database = request.config.getoption("--database")
    if database != "sqlite" or request.config.getoption("--nodes") > 1:
        uri = request.getfixturevalue("galera" if database == "galera" else "mariadb").create_database()
    loop = f"--event-loop={request.config.getoption('--loop')}"
    running = Installation(
        way,
        tmp_path_factory.mktemp("installation"),
        [loop],
        database=uri,
        nodes=request.config.getoption("--nodes"),
        strategy=request.config.getoption("--strategy"),
    )
    try:
        running.start()
        yield running
    finally:
        codes = running.stop()
    # grpcio crashes now and then (one process in some 70) while a process ends and its peers do too. It is told, and
    # not taken for ours if the process had begun to stop; docs/operations.md has it.
    crashed = [name for name, code in codes.items() if code == -signal.SIGSEGV and '"stopping"' in running.log(name)]
    if crashed:
        warnings.warn(f"crashed while they stopped: {crashed}", stacklevel=1)
    faults = [f"{name} ended with {code}" for name, code in codes.items() if code and name not in crashed]
    logs = running.logs()
    faults += [line for line in logs.splitlines() if '"level": "error"' in line]
    # What is wrong stands last: of a long report the end is what is seen.
    if faults:
        pytest.fail("\n".join([logs[-4000:], "", *faults]), pytrace=False)


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    if shutil.which("mariadbd") is None:
        pytest.fail("MariaDB is wanted: apt-get install mariadb-server-core mariadb-client-core")
    server = MariaDB(tmp_path_factory.mktemp("mariadb"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def galera(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Galera]:
    """Three servers in sync. Whoever breaks one heals it."""
    if not PROVIDER.exists() or shutil.which("wsrep_sst_mariabackup") is None:
        pytest.fail("Galera is wanted: apt-get install mariadb-server mariadb-backup galera-4 socat")
    cluster = Galera(tmp_path_factory.mktemp("galera"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(params=["sqlite", "mysql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> DatabaseUrl:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return DatabaseUrl("sqlite", path=tmp_path / "test.sqlite")
    server: MariaDB = request.getfixturevalue("mariadb")
    return parse(server.create_database())


@pytest.fixture
async def database(database_url: DatabaseUrl) -> AsyncIterator[Database]:
    opened = Database(database_url)
    await opened.start()
    yield opened
    await opened.stop()
