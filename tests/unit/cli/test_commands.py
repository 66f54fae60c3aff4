"""The command line, as a person calls it; the node behind it is a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidings.cluster.view import ClusterView
from tidings.kit.identity import Identities
from tidings.kit.pki import CertificateAuthority
from tidings.testing.mariadb import MariaDB
from tidings.testing.server import Installation, free_port


def tidings(
    *words: str, folder: Path, typed: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    return subprocess.run(
        [sys.executable, "-m", "tidings", *words],
        input=typed, stdin=subprocess.DEVNULL if typed is None else None, capture_output=True, text=True, cwd=folder, timeout=60,
        env={**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
    )  # fmt: skip


@pytest.fixture
def call(installation: Installation, tmp_path: Path):  # type: ignore[no-untyped-def]
    def run(*words: str, typed: str | None = None) -> subprocess.CompletedProcess[str]:
        where = f"--bind-address={installation.registry_address}"
        return tidings(*words, *installation.arguments(), where, folder=tmp_path, typed=typed)

    return run


def test_users_are_added_changed_listed_and_removed(call) -> None:  # type: ignore[no-untyped-def]
    assert call("user", "add", "cli@localhost", typed="a good password\n").returncode == 0
    again = call("user", "add", "cli@localhost", typed="a good password\n")
    assert again.returncode == 1
    assert "cli@localhost exists already" in again.stderr
    assert call("user", "passwd", "cli@localhost", typed="a better one\n").returncode == 0
    listed = json.loads(call("user", "list", "localhost", "--json").stdout)
    assert "cli@localhost" in [account["jid"] for account in listed]
    assert call("user", "remove", "cli@localhost").returncode == 0
    gone = call("user", "passwd", "cli@localhost", typed="x\n")
    assert gone.returncode == 1
    assert "there is no account cli@localhost" in gone.stderr


def test_a_password_is_never_an_argument_and_never_empty(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused = call("user", "add", "cli2@localhost", "--password=secret", typed="x\n")
    assert refused.returncode == 2
    assert "secret" not in refused.stderr
    empty = call("user", "add", "cli2@localhost", typed="\n")
    assert (empty.returncode, "empty" in empty.stderr) == (1, True)
    (tmp_path / "pw").write_text("from a file\n")
    assert call("user", "add", "cli2@localhost", "--password-file", str(tmp_path / "pw")).returncode == 0
    assert call("user", "remove", "cli2@localhost").returncode == 0


@pytest.mark.parametrize("jid", ["nobody", "a@elsewhere.example", "a@localhost/x", "@localhost", "a b@localhost"])
def test_an_account_that_can_not_be_is_refused_with_a_sentence(call, jid: str) -> None:  # type: ignore[no-untyped-def]
    result = call("user", "add", jid, typed="x\n")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_nodes_are_one_json_list_of_flat_objects(call, way: str) -> None:  # type: ignore[no-untyped-def]
    listed = json.loads(call("nodes", "--json").stdout)
    assert set(listed[0]) == {
        "hostname",
        "address",
        "port",
        "incarnation",
        "services",
        "state",
        "last_update",
        "version",
        "strategy",
    }
    assert {node["state"] for node in listed} == {"up"}
    services = sorted(service for node in listed for service in node["services"])
    assert services == ["connector", "pubsub", "registry", "router"]
    assert len(listed) == (4 if way == "processes" else 1)
    assert "up" in call("nodes").stdout


def test_a_certificate_for_a_program_lists_the_nodes(call, installation: Installation, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The twenty lines that an outsider writes, with nothing but the published stubs."""
    assert call("cert", "client", "backup", "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "backup.key").stat().st_mode & 0o777 == 0o600
    program = f"""
import grpc
from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
ca, key, crt = (open(f"{tmp_path}/{{name}}", "rb").read() for name in ("ca.crt", "backup.key", "backup.crt"))
channel = grpc.secure_channel(
    "{installation.registry_address}:{installation.cluster_port}",
    grpc.ssl_channel_credentials(ca, key, crt),
    options=[("grpc.ssl_target_name_override", "registry.tidings.invalid")],
)
for node in RegistryServiceStub(channel).ListNodes(ListNodesRequest(), timeout=10).nodes:
    print(node.hostname, node.address, *node.services)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert "registry" in result.stdout, result.stderr


def test_a_certificate_for_a_program_can_be_limited(tmp_path: Path) -> None:
    assert tidings("cert", "ca", folder=tmp_path).returncode == 0
    for words in (["all"], ["weather", "component"], ["both", "accounts", "nodes"]):
        made = tidings("cert", "client", *words, "--ca=.", folder=tmp_path)
        assert made.returncode == 0, made.stderr
    identities = Identities([CertificateAuthority.from_file(tmp_path / "cluster-ca.crt")])
    scopes = {}
    for name in ("all", "weather", "both"):
        caller = identities.identify((tmp_path / f"{name}.crt").read_bytes(), ClusterView())
        assert caller is not None
        scopes[caller.name] = caller.services
    assert scopes == {
        "all": {"accounts", "component", "nodes"},
        "weather": {"component"},
        "both": {"accounts", "nodes"},
    }
    wrong = tidings("cert", "client", "weather", "root", folder=tmp_path)
    assert (wrong.returncode, "there are accounts, component, nodes" in wrong.stderr) == (1, True)


def test_a_key_is_not_written_into_a_file_that_others_have_open(tmp_path: Path) -> None:
    key = tmp_path / "backup.key"
    key.write_text("an old one")
    key.chmod(0o644)
    with key.open() as open_before:
        assert tidings("cert", "client", "backup", folder=tmp_path).returncode == 0
        assert open_before.read() == "an old one"
    assert "PRIVATE KEY" in key.read_text()
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "backup.crt").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.crt", "backup.key", "ca.crt", "data"]


def test_a_node_that_is_not_there_is_said_to_be_unreachable(tmp_path: Path) -> None:
    result = tidings("nodes", "--cluster-port=1", folder=tmp_path)
    assert result.returncode == 3
    assert "no node answers at 127.0.0.1:1" in result.stderr


def test_check_finds_what_is_wrong_and_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_text("no certificate")
    result = tidings(
        "check", "--virt-hosts=example.org", f"--tls-cert-file={tmp_path / 'c.pem'}", f"--tls-key-file={tmp_path / 'c.pem'}",
        "--user-db=mysql", "--user-db-uri=jdbc:mysql://127.0.0.1:1/x?user=u&password=p", "--cluster-mode=true",
        "--cluster-hostname=localhost", "--json", folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    errors = {
        finding["subject"]: finding["text"] for finding in json.loads(result.stdout) if finding["verdict"] == "error"
    }
    assert {"certificate", "database", "names"} <= set(errors)
    assert "--cluster-hostname" in errors["names"]
    assert "password" not in result.stdout


@pytest.mark.parametrize("flushing", ["0", "1", "2"])
def test_check_warns_of_a_database_that_forgets_at_a_power_failure(
    tmp_path: Path, mariadb: MariaDB, flushing: str
) -> None:
    uri = mariadb.create_database()
    mariadb._execute(f"set global innodb_flush_log_at_trx_commit = {flushing}")
    try:
        result = tidings("check", "--user-db=mysql", f"--user-db-uri={uri}", "--json", folder=tmp_path)
    finally:
        mariadb._execute("set global innodb_flush_log_at_trx_commit = 1")
    found = [finding for finding in json.loads(result.stdout) if finding["subject"] == "database"]
    assert found[0]["verdict"] == "ok"
    warnings = [finding["text"] for finding in found if finding["verdict"] == "warning"]
    assert len(warnings) == (flushing != "1")
    assert all("set innodb_flush_log_at_trx_commit=1" in text for text in warnings)


def test_check_is_content_with_a_new_installation(tmp_path: Path) -> None:
    ports = [f"--{name}=0" for name in ("c2s-ports", "c2s-tls-ports", "cluster-port", "admin-port")]
    result = tidings("check", "--virt-hosts=example.org", *ports, folder=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "self-made" in result.stdout


def test_help_has_examples_and_exit_codes(tmp_path: Path) -> None:
    text = tidings("--help", folder=tmp_path).stdout
    for command in ("run", "user", "nodes", "options", "check", "cert", "completion", "version"):
        assert command in text
        assert "Example" in tidings(command, "--help", folder=tmp_path).stdout
    assert "Exit codes" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(tmp_path: Path, shell: str) -> None:
    assert "_TIDINGS_COMPLETE" in tidings("completion", shell, folder=tmp_path).stdout


def test_commands_answer_in_under_a_second(tmp_path: Path) -> None:
    for command in (["version"], ["options"], ["--help"]):
        times = []
        for _ in range(3):
            before = time.monotonic()
            assert tidings(*command, folder=tmp_path).returncode == 0
            times.append(time.monotonic() - before)
        assert min(times) < 1.0, command


def test_unknown_options_and_services_are_usage_errors(tmp_path: Path) -> None:
    wrong = tidings("run", "--virt-host=x", folder=tmp_path)
    assert (wrong.returncode, "did you mean --virt-hosts?" in wrong.stderr) == (2, True)
    unknown = tidings("run", "muc", folder=tmp_path)
    assert (unknown.returncode, "there is no service 'muc'" in unknown.stderr) == (2, True)


def test_a_port_in_use_names_its_holder(tmp_path: Path) -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        result = tidings(
            "run", "--bind-address=127.0.0.1", f"--c2s-ports={port}", "--c2s-tls-ports=0",
            f"--cluster-port={free_port('127.0.0.1')}", "--admin-port=0", folder=tmp_path,
        )  # fmt: skip
    assert result.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use by" in result.stderr
    assert f"process {os.getpid()}" in result.stderr


def test_a_second_start_uses_the_data_of_the_first_and_stops_within_five_seconds(tmp_path: Path) -> None:
    first = Installation("in-process", tmp_path)
    try:
        first.start()
    finally:
        before = time.monotonic()
        codes = first.stop()
    assert codes == {"all": 0}
    assert time.monotonic() - before < 5
    password = (tmp_path / "data" / "admin-password").read_text()
    assert (tmp_path / "data" / "admin-password").stat().st_mode & 0o777 == 0o600
    (tmp_path / "all.log").write_text("")
    second = Installation("in-process", tmp_path)
    try:
        second.start()
    finally:
        codes = second.stop()
    assert codes == {"all": 0}
    assert (tmp_path / "data" / "admin-password").read_text() == password
    assert "admin_account_made" not in second.log("all")


def test_the_node_that_passes_the_order_on_can_be_drained_itself(tmp_path: Path) -> None:
    running = Installation("in-process", tmp_path)
    where = [*running.arguments(), f"--bind-address={running.registry_address}"]
    try:
        running.start()
        (node,) = json.loads(tidings("nodes", "--json", *where, folder=tmp_path).stdout)
        drained = tidings("drain", node["hostname"], *where, folder=tmp_path)
        assert (drained.returncode, "has left" in drained.stderr) == (0, True), drained.stderr
        assert running.processes["all"].wait(10) == 0
    finally:
        running.stop()
