"""A Galera cluster of one's own, for tests: three MariaDB servers that replicate, each on an address of loopback.

What its nodes are started with is what docs/operations.md tells to write into their files.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pymysql

from tidings.testing.mariadb import MariaDB
from tidings.testing.server import free_port

ADDRESSES = ("127.0.0.61", "127.0.0.62", "127.0.0.63")
PROVIDER = Path("/usr/lib/galera/libgalera_smm.so")
# A node that comes to a cluster copies all that there is.
JOIN_TIMEOUT = 60.0
# Who has not been heard of for 1.5 s is put out, when the others agree, or after 3 s in any case. Till then nobody
# commits. (By default 5 and 15 s.)
DETECTION = (
    "evs.keepalive_period=PT0.5S; evs.inactive_check_period=PT0.25S; evs.suspect_timeout=PT1.5S; "
    "evs.inactive_timeout=PT3S; evs.install_timeout=PT3S"
)

RECOVERED = re.compile(r"WSREP: Recovered position: (\S+)")


class GaleraNode(MariaDB):
    """One node. Its data survive `kill`; `start` brings it back, by what it missed or by a copy of all."""

    def __init__(self, folder: Path, address: str, cluster: str) -> None:
        """`cluster`: its name; nodes of another one are turned away."""
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.address = self._address = address
        self._cluster = cluster
        self.port = free_port(address)
        self.group_port = free_port(address)
        self._ist_port = free_port(address)
        self._sst_port = free_port(address)
        self._peers: Sequence[GaleraNode] = (self,)
        self._program = ("mariadbd", f"--defaults-file={folder / 'my.cnf'}")

    def found(self) -> None:
        """Starts it as the first one of a new cluster."""
        if not self._data.exists():
            self._install()
        self._spawn("--wsrep-new-cluster")
        self.wait_synced()

    def copy(self, other: GaleraNode) -> None:
        """Begins with the data of another one that was stopped: to be given a copy takes longer."""
        shutil.copytree(other._data, self._data, ignore=shutil.ignore_patterns("galera.cache", "gvwstate.dat"))

    def lose(self) -> None:
        """Loses its data, as with its disk."""
        shutil.rmtree(self._data)
        self._data.mkdir()

    def meet(self, peers: Sequence[GaleraNode]) -> None:
        """Says of which nodes, with it, the cluster consists; from its next start on."""
        self._peers = peers

    def start(self) -> None:
        """Starts it again and waits until it is in sync."""
        self.begin()
        self.wait_synced()

    def begin(self) -> None:
        """Starts it again. If it was killed its position is in its tables, not in its file: it is read first, as
        Debian's `galera_recovery` does, or it would have to copy all."""
        position = self._recovered() if (self._data / "ibdata1").exists() else None
        self._spawn(*([f"--wsrep-start-position={position}"] if position else []))

    def _install(self) -> None:
        user = ["--user=root"] if os.geteuid() == 0 else []
        subprocess.run(
            [
                "mariadb-install-db", "--no-defaults", f"--datadir={self._data}", "--skip-test-db",
                "--auth-root-authentication-method=normal", *user,
            ],
            check=True, capture_output=True,
        )  # fmt: skip

    def _configure(self) -> None:
        """Writes its file of options: the programs that copy data between nodes read it too."""
        others = ",".join(f"{peer.address}:{peer.group_port}" for peer in self._peers)
        lines = {
            "datadir": self._data, "socket": self._socket, "pid-file": self._folder / "pid",
            "port": self.port, "bind-address": self.address,
            "innodb-buffer-pool-size": "64M", "max-connections": 500,
            "binlog-format": "row", "default-storage-engine": "InnoDB", "innodb-autoinc-lock-mode": 2,
            "innodb-flush-log-at-trx-commit": 1,
            "wsrep-on": "ON", "wsrep-provider": PROVIDER,
            "wsrep-cluster-name": self._cluster, "wsrep-cluster-address": f"gcomm://{others}",
            "wsrep-provider-options":
                f'"gmcast.listen_addr=tcp://{self.address}:{self.group_port}; '
                f'ist.recv_addr={self.address}:{self._ist_port}; gcache.size=64M; {DETECTION}"',
            "wsrep-node-name": self.address, "wsrep-node-address": f"{self.address}:{self.group_port}",
            "wsrep-node-incoming-address": f"{self.address}:{self.port}",
            "wsrep-sst-method": "mariabackup", "wsrep-sst-auth": "root:",
            "wsrep-sst-receive-address": f"{self.address}:{self._sst_port}",
            **({"user": "root"} if os.geteuid() == 0 else {}),
        }  # fmt: skip
        written = "\n".join(f"{name} = {value}" for name, value in lines.items())
        (self._folder / "my.cnf").write_text(f"[mysqld]\n{written}\n[sst]\nsst-log-archive = 0\n")

    def _recovered(self) -> str | None:
        self._configure()
        run = subprocess.run(
            [*self._program, "--wsrep-recover", "--skip-networking"],
            check=True, capture_output=True, text=True, timeout=JOIN_TIMEOUT,
        )  # fmt: skip
        found = RECOVERED.findall(run.stderr + run.stdout)
        return found[-1] if found else None

    def _spawn(self, *more: str) -> None:
        self._configure()
        with (self._folder / "mariadb.log").open("ab") as log:
            # A session of its own: what it starts to copy data ends with it.
            self._process = subprocess.Popen(
                [*self._program, *more], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def status(self, name: str) -> str:
        """What it says of itself, such as `wsrep_cluster_size`. Raises pymysql.Error when it says nothing."""
        connection = pymysql.connect(unix_socket=str(self._socket), user="root", connect_timeout=2, read_timeout=2)
        try:
            with connection.cursor() as cursor:
                cursor.execute("show global status like %s", (name,))
                row = cursor.fetchone()
                return str(row[1]) if row else ""
        finally:
            connection.close()

    def wait_synced(self, size: int = 1) -> None:
        """Waits until it is in step with a cluster of at least `size` nodes."""
        assert self._process is not None
        deadline = time.monotonic() + JOIN_TIMEOUT
        while True:
            try:
                if (
                    self.status("wsrep_local_state_comment") == "Synced"
                    and int(self.status("wsrep_cluster_size")) >= size
                ):
                    return
            except pymysql.err.OperationalError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self._folder / "mariadb.log").read_text(errors="replace")[-6000:])
            time.sleep(0.05)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Ends it, and what it has started, as a power cut would."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Galera:
    """Three nodes that hold the same data. `create_database` names them all, in their order."""

    def __init__(self, folder: Path, addresses: Sequence[str] = ADDRESSES) -> None:
        name = f"test-{secrets.token_hex(4)}"
        self.nodes = [GaleraNode(folder / f"g{n}", address, name) for n, address in enumerate(addresses, 1)]

    def start(self) -> None:
        first, *others = self.nodes
        first.found()
        first.stop()
        for node in others:
            node.copy(first)
        for node in self.nodes:
            node.meet(self.nodes)
        first.found()
        for node in others:
            # One by one: two that meet before they have met the first one lose seconds.
            node.start()
        for node in self.nodes:
            node.wait_synced(len(self.nodes))

    def create_database(self) -> str:
        """A new database; its URI, as --user-db-uri takes it."""
        uri = self.nodes[0].create_database()
        places = ",".join(f"{node.address}:{node.port}" for node in self.nodes)
        return uri.replace(f"{self.nodes[0].address}:{self.nodes[0].port}", places)

    def heal(self) -> None:
        """Brings back those that hang or are dead, and waits until all are in sync."""
        for node in self.nodes:
            if node.runs:
                node.go_on()
            else:
                node.begin()
        for node in self.nodes:
            node.wait_synced(len(self.nodes))

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()
