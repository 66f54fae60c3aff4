"""Galera as the database of a cluster that is drilled: what is done to a database is done to one of its nodes."""

from __future__ import annotations

from pathlib import Path

import pymysql

from tidings.testing.galera import Galera, GaleraNode


class Replicated:
    """Three nodes that hold the same data; one after the other is the one that dies, or stands still."""

    def __init__(self, folder: Path) -> None:
        self._galera = Galera(folder)
        self._struck: GaleraNode | None = None
        self._turn = 0

    def start(self) -> None:
        """Brings back what was killed, without waiting for it; the first time all."""
        if self._struck is None:
            self._galera.start()
        elif not self._struck.runs:
            self._struck.begin()

    def create_database(self) -> str:
        return self._galera.create_database()

    def kill(self) -> None:
        self._next().kill()

    def hang(self) -> None:
        self._next().hang()

    def go_on(self) -> None:
        if self._struck is not None and self._struck.runs:
            self._struck.go_on()

    def _next(self) -> GaleraNode:
        """Whose turn it is; the same again while it is not back: two of three are needed."""
        if self._struck is None or _is_whole(self._struck):
            self._struck = self._galera.nodes[self._turn % len(self._galera.nodes)]
            self._turn += 1
        elif not self._struck.runs:
            self._struck.begin()
        return self._struck

    def heal(self) -> None:
        """Waits until all are in step."""
        self._galera.heal()

    def stop(self) -> None:
        self._galera.stop()


def _is_whole(node: GaleraNode) -> bool:
    try:
        return node.runs and node.status("wsrep_local_state_comment") == "Synced"
    except pymysql.Error:
        return False
