"""A MariaDB of one's own, for tests: from Debian's packages, in a folder, on loopback."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from pathlib import Path

import pymysql

from tidings.testing.network import Host
from tidings.testing.server import free_port

START_TIMEOUT = 30.0


class MariaDB:
    """One server. Its data live in `folder` and survive `kill` and `restart`."""

    def __init__(self, folder: Path, host: Host | None = None) -> None:
        """`host`: where it runs, if not on this machine's loopback."""
        self._folder = folder
        self._host = host
        self._address = host.address if host else "127.0.0.1"
        self._data = folder / "data"
        self._socket = folder / "s"
        self.port = free_port("127.0.0.1")
        self._process: subprocess.Popen[bytes] | None = None
        self._password = secrets.token_hex(8)

    def start(self) -> None:
        user = ["--user=root"] if os.geteuid() == 0 else []
        if not self._data.exists():
            # Without --skip-test-db an anonymous user would shadow ours on loopback.
            subprocess.run(
                [
                    "mariadb-install-db", "--no-defaults", f"--datadir={self._data}", "--skip-test-db",
                    "--auth-root-authentication-method=normal", *user,
                ],
                check=True, capture_output=True,
            )  # fmt: skip
        log = (self._folder / "mariadb.log").open("ab")
        self._process = subprocess.Popen(
            [
                *(self._host.command() if self._host else ()),
                "mariadbd", "--no-defaults", f"--datadir={self._data}", f"--socket={self._socket}",
                f"--port={self.port}", f"--bind-address={self._address}", f"--pid-file={self._folder / 'pid'}",
                "--innodb-buffer-pool-size=64M", "--max-connections=500", *user,
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self._execute("select 1")
                return
            except pymysql.err.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self._folder / "mariadb.log").read_text()[-4000:]) from None
                time.sleep(0.05)

    def _execute(self, *statements: str) -> None:
        connection = pymysql.connect(unix_socket=str(self._socket), user="root")
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
            connection.commit()
        finally:
            connection.close()

    def create_database(self) -> str:
        """A new database; its URI, as --user-db-uri takes it."""
        name = f"t{secrets.token_hex(6)}"
        self._execute(
            f"create database {name}",
            f"create user if not exists '{name}'@'%' identified by '{self._password}'",
            f"grant all on {name}.* to '{name}'@'%'",
        )
        return f"jdbc:mysql://{self._address}:{self.port}/{name}?user={name}&password={self._password}"

    def kill(self) -> None:
        """Ends it as a power cut would end its process."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        """Lets it stand still: it accepts connections, and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
