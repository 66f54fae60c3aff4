"""A network of hosts in namespaces of their own, which a test can cut and heal. Linux, as root.

Each host has an address on one switch; the machine itself has one too, so that a test's clients reach all hosts.
A cut is silent: packets go to a hardware address that nobody has. Nothing is refused, nothing comes back.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from itertools import combinations

NOBODY = "02:00:00:00:de:ad"


@dataclass(frozen=True, slots=True)
class Host:
    """One host: its namespace and its address."""

    namespace: str
    address: str

    def command(self) -> list[str]:
        """What goes before the words of a program that is to run there."""
        return ["ip", "netns", "exec", self.namespace]


class Network:
    """Hosts on one switch."""

    def __init__(self, *names: str) -> None:
        """`names`: of the hosts, which get the addresses .11, .12 and so on."""
        tag = secrets.token_hex(3)
        self._switch = f"t{tag}-switch"
        self._uplink = f"t{tag}up"
        # A /24 of 10.64.0.0/10 for each network: several may be there at one time.
        part = secrets.randbelow(64 * 256)
        self._prefix = f"10.{64 + part // 256}.{part % 256}"
        self.hosts = {
            name: Host(f"t{tag}-{name}", f"{self._prefix}.{11 + number}") for number, name in enumerate(names)
        }

    def start(self) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise AssertionError(
                "network namespaces need root and iproute2: apt-get install iproute2, and run as root"
            )
        _ip("netns", "add", self._switch)
        self._in_switch("link", "add", "name", "switch0", "type", "bridge", "forward_delay", "0")
        self._in_switch("link", "set", "switch0", "up")
        for number, host in enumerate(self.hosts.values()):
            _ip("netns", "add", host.namespace)
            self._plug("eth0", f"p{number}", host.address, host.namespace)
            _in(host.namespace, "link", "set", "lo", "up")
        self._plug(self._uplink, "uplink", f"{self._prefix}.1", "")

    def _plug(self, inner: str, port: str, address: str, namespace: str) -> None:
        """A cable from a host (or, without a namespace, from this machine) to the switch."""
        place = ["-n", namespace] if namespace else []
        _ip(*place, "link", "add", "name", inner, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip(*place, "addr", "add", f"{address}/24", "dev", inner)
        _ip(*place, "link", "set", inner, "up")
        self._in_switch("link", "set", "dev", port, "master", "switch0", "up")

    def _in_switch(self, *words: str) -> None:
        _in(self._switch, *words)

    def cut(self, name: str, *others: str) -> None:
        """From now on nothing passes between a host and the others."""
        for one, other in self._ways(name, others):
            _in(one.namespace, "neigh", "replace", other.address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")

    def heal(self, name: str, *others: str) -> None:
        """It passes again."""
        for one, other in self._ways(name, others):
            _in(one.namespace, "neigh", "del", other.address, "dev", "eth0")

    def _ways(self, name: str, others: tuple[str, ...]) -> list[tuple[Host, Host]]:
        pairs = [pair for pair in combinations((name, *others), 2) if name in pair]
        both = [*pairs, *((other, one) for one, other in pairs)]
        return [(self.hosts[one], self.hosts[other]) for one, other in both]

    def stop(self) -> None:
        """Takes all of it away; programs in it must have ended."""
        for namespace in (*(host.namespace for host in self.hosts.values()), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._uplink], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _in(namespace: str, *words: str) -> None:
    _ip("-n", namespace, *words)
