"""What this process is called, where peers find it, and which keys it has."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidings import __version__
from tidings.cluster.node import Node
from tidings.kit.options import OptionError, Options
from tidings.kit.pki import URI_NODE, CertificateAuthority, KeyPair, machine_secret, normalised

# The level of the wire protocol that this release speaks.
PROTOCOL = 1
LOOPBACK = ("127.0.0.1", "::1")


def authorities(options: Options) -> list[CertificateAuthority]:
    """The authorities whose leaves this process accepts, its own signer first (DESIGN 6). Raises PkiError."""
    found: list[CertificateAuthority] = []
    if options["cluster-secret"]:
        found.append(CertificateAuthority.from_secret(options["cluster-secret"]))
    found.append(CertificateAuthority.from_secret(machine_secret(Path(options["data-dir"]))))
    if options["cluster-tls-ca-file"]:
        found.append(CertificateAuthority.from_file(options["cluster-tls-ca-file"]))
    return found


def own_keys(options: Options, signer: CertificateAuthority, name: str) -> KeyPair:
    """The certificate that this process shows: the given one, else a new leaf at every start."""
    certificate, key = options["cluster-tls-cert-file"], options["cluster-tls-key-file"]
    if bool(certificate) != bool(key):
        raise OptionError(["set both --cluster-tls-cert-file and --cluster-tls-key-file, or neither"])
    if certificate:
        return KeyPair(Path(certificate).read_bytes(), Path(key).read_bytes())
    return signer.issue([f"{URI_NODE}{name}"], name)


def cluster_addresses(options: Options) -> list[str]:
    """The addresses on which the cluster port is bound."""
    if options["bind-address"]:
        return list(options["bind-address"])
    if options["cluster-mode"]:
        # gRPC takes all of IPv4 with it.
        return ["::"] if _has_ipv6() else ["0.0.0.0"]  # noqa: S104 - all, as the option's default says
    return list(LOOPBACK) if _has_ipv6() else [LOOPBACK[0]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands in the cluster. Found out once: every start of its node has the same, also when names
    resolve no longer, or to something else."""

    name: str
    address: str


def own_place(options: Options, services: Sequence[str]) -> Place:
    """This process's. Raises OptionError for what can't work."""
    name = own_name(options, services, alone="registry" in services and "router" in services)
    return Place(name, own_address(options, name))


def own_node(options: Options, services: Sequence[str], keys: KeyPair, place: Place) -> Node:
    """This process as it will stand in the table."""
    return Node(
        hostname=place.name,
        secondary=options["cluster-secondary"],
        address=place.address,
        port=options["cluster-port"],
        host=options["cluster-host"] or _boot_id(),
        incarnation=secrets.token_hex(8),
        services=tuple(sorted(services)),
        version=__version__,
        protocol=PROTOCOL,
        virtual_hosts=tuple(sorted(options["virt-hosts"])),
        strategy=options["sm-cluster-strategy-class"] if "router" in services else "",
        started_unix_ms=int(time.time() * 1000),
        certificate=normalised(keys.certificate),
    )


def own_address(options: Options, name: str) -> str:
    """The address that peers dial. Raises OptionError for one that they could not reach."""
    bound = _dialled(options)
    if options["cluster-address"]:
        address = str(options["cluster-address"])
    elif len(bound) == 1 or (bound and not options["cluster-mode"]):
        address = bound[0]
    elif options["cluster-mode"]:
        address = options["cluster-secondary"] or name
    else:
        address = LOOPBACK[0]
    if options["cluster-mode"]:
        _check_reachable(options, name, address)
    return address


def local_address(options: Options) -> str:
    """Where this machine's processes reach the cluster port."""
    bound = _dialled(options)
    return bound[0] if bound else LOOPBACK[0]


def own_name(options: Options, services: Sequence[str], alone: bool) -> str:
    """This node's name. Services of one machine without cluster mode are told apart by what they run."""
    if options["cluster-hostname"]:
        return str(options["cluster-hostname"])
    name = socket.getfqdn() or "localhost"
    if options["cluster-mode"] or alone:
        return name
    return f"{'-'.join(sorted(services))}.{name}"


def _check_reachable(options: Options, name: str, address: str) -> None:
    if name.split(".")[0] == "localhost":
        raise OptionError(
            ["a node of a cluster can't be called localhost; set --cluster-hostname to a name of its own"]
        )
    bound = options["bind-address"]
    if any(_is_loopback(one) for one in bound):
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        if options["cluster-address"] and error.errno == socket.EAI_AGAIN:
            return  # no name server answers now: that says nothing against an address that somebody has set
        raise OptionError(
            [f"peers could not find this node: {address} does not resolve; set --cluster-address"]
        ) from None
    if all(_is_loopback(str(one)) for one in found):
        raise OptionError(
            [
                f"peers could not reach this node: {address} resolves to {', '.join(sorted(map(str, found)))}; set "
                "--cluster-address to an address that they reach"
            ]
        )


def _dialled(options: Options) -> list[str]:
    """The addresses of --bind-address that somebody can dial: 0.0.0.0 and :: stand for all, as none does."""
    return [str(one) for one in options["bind-address"] if not _is_unspecified(one)]


def _is_unspecified(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def load() -> tuple[float, float]:
    """CPU and memory of this machine in percent, for the table."""
    cpu = min(100.0, 100.0 * os.getloadavg()[0] / (os.cpu_count() or 1))
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
        return cpu, 100.0 * (total - available) / total
    except (OSError, KeyError, ValueError):
        return cpu, 0.0
