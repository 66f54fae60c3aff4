"""What a process is called and where peers find it (DESIGN 5)."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from tidings.kit import runner
from tidings.kit.grpc_server import ClusterServer
from tidings.kit.identity import Caller
from tidings.kit.options import OptionError, Options, load
from tidings.kit.own_node import Place, cluster_addresses, local_address, own_node, own_place
from tidings.kit.pki import CertificateAuthority
from tidings.kit.runner import Ending, Process, Then
from tidings.testing.server import free_port

DATABASE = ("--user-db=mysql", "--user-db-uri=jdbc:mysql://127.0.0.1/t?user=u&password=p")
CLUSTER = ("--cluster-mode=true", *DATABASE)
SERVICES = ("registry", "router")


def options(*arguments: str) -> Options:
    return load([*arguments, "--config="], {})


def no_name_server(*_arguments: Any, **_more: Any) -> Any:
    raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")


def unknown_name(*_arguments: Any, **_more: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "no such name")


@pytest.mark.parametrize("everywhere", ["0.0.0.0", "::", "0.0.0.0,::"])
def test_an_address_that_stands_for_all_is_none_that_peers_could_dial(everywhere: str) -> None:
    bound = f"--bind-address={everywhere}"
    named = options(*CLUSTER, bound, "--cluster-hostname=n1.test", "--cluster-secondary=192.0.2.7")
    assert own_place(named, SERVICES).address == "192.0.2.7"
    alone = options(bound)
    assert own_place(alone, SERVICES).address == local_address(alone) == "127.0.0.1"


def test_of_several_addresses_those_that_can_be_dialled_count() -> None:
    assert own_place(options("--bind-address=0.0.0.0,127.0.0.11"), SERVICES).address == "127.0.0.11"
    assert local_address(options("--bind-address=::,::1")) == "::1"


def test_later_starts_of_a_node_need_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that was put out joins again, whatever has become of the network meanwhile."""
    ours = options(*CLUSTER, "--cluster-hostname=n1.test", "--cluster-address=192.0.2.7")
    place = own_place(ours, SERVICES)
    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    monkeypatch.setattr(socket, "getfqdn", lambda: "another.test")
    keys = CertificateAuthority.new("x").issue([f"tidings:node:{place.name}"], place.name)
    node = own_node(ours, SERVICES, keys, place)
    assert (node.hostname, node.address) == ("n1.test", "192.0.2.7")


async def test_a_node_that_joins_again_has_the_place_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Place] = []

    async def start(process: Process, _told: asyncio.Event, _ready: Any) -> Ending | None:
        places.append(process.place)
        monkeypatch.setattr(socket, "getfqdn", lambda: "another.test")
        return Ending("it was put out", Then.JOIN_AGAIN) if len(places) == 1 else None

    monkeypatch.setattr(socket, "getfqdn", lambda: "n1.test")
    monkeypatch.setattr(runner, "_serve_once", start)
    assert await runner.serve(options(*CLUSTER, "--cluster-address=192.0.2.7"), SERVICES) == 0
    assert places == [Place("n1.test", "192.0.2.7")] * 2


def test_an_address_that_somebody_has_set_is_not_refused_because_no_name_server_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The supervisor starts a died process again then; it has set that address when names still resolved."""
    ours = options(*CLUSTER, "--cluster-hostname=n1.test", "--cluster-address=n1.test")
    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    assert own_place(ours, SERVICES).address == "n1.test"
    monkeypatch.setattr(socket, "getaddrinfo", unknown_name)
    with pytest.raises(OptionError, match=r"n1\.test does not resolve; set --cluster-address"):
        own_place(ours, SERVICES)


def test_a_name_that_nobody_resolves_now_is_refused_where_no_address_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    with pytest.raises(OptionError, match="set --cluster-address"):
        own_place(options(*CLUSTER, "--cluster-hostname=n1.test"), SERVICES)


async def test_a_node_of_a_cluster_that_names_no_address_is_reached_by_all_of_them() -> None:
    """The lines of the README name none. gRPC takes IPv4 with `::`, and can't bind both."""
    keys = CertificateAuthority.new("x").issue(["tidings:node:n1.test"], "n1.test")
    port = free_port("127.0.0.1")
    server = ClusterServer(
        cluster_addresses(options(*CLUSTER)), port, keys, lambda: b"", lambda _leaf: None, Caller("local", "n1.test")
    )
    await server.start()
    try:
        for address in ("127.0.0.1", "127.0.0.2"):
            _reader, writer = await asyncio.open_connection(address, port)
            writer.close()
            await writer.wait_closed()
    finally:
        await server.stop(0)
