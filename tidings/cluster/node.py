"""A node: one running process of the cluster."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from enum import Enum

_LABEL = r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\Z")


class NodeState(Enum):
    """Where a node stands in its life. The values are what people read in the table."""

    JOINING = "joining"
    UP = "up"
    SUSPECT = "suspect"
    FAILED = "failed"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Node:
    """One row of `cluster_nodes`; the meaning of each field stands in common/v1/node.proto."""

    hostname: str
    incarnation: str
    address: str
    port: int
    services: tuple[str, ...] = ()
    state: NodeState = NodeState.JOINING
    secondary: str = ""
    host: str = ""
    beat: int = 0
    version: str = ""
    protocol: int = 1
    virtual_hosts: tuple[str, ...] = ()
    strategy: str = ""
    started_unix_ms: int = 0
    last_update_unix_ms: int = 0
    cpu_usage: float = 0.0
    mem_usage: float = 0.0
    # The view up to which it has cleaned up after nodes that failed; only registries know it.
    cleaned: int = 0
    # Incarnations that it does not reach, by its own word, and the version of the view with which it joined.
    unreachable: tuple[str, ...] = ()
    joined: int = 0
    certificate: str = field(default="", repr=False)


def is_host(text: str) -> bool:
    """Whether somebody can dial it: a host name (RFC 1123, and underscores), or an IP address."""
    if _HOST_NAME.match(text):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
