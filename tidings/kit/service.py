"""What a service is to the process that runs it.

A service package exports one name, `SERVICE`, a `ServiceSpec`, and names it in the entry-point group
`tidings.services`. The runner (`tidings.kit.runner`) builds the services of a process, starts them in
order, and stops them in reverse. A service meets the others only through gRPC channels, which it gets from
its `Context`; it cannot tell whether one of them ends in its own process.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from tidings.cluster.node import Node
    from tidings.kit.channel import Channels
    from tidings.kit.db import Database
    from tidings.kit.grpc_server import ClusterServer
    from tidings.kit.membership import Member
    from tidings.kit.metrics import Metrics
    from tidings.kit.options import Option, Options
    from tidings.kit.tasks import Tasks

GROUP = "tidings.services"


class ServiceProblem(Exception):
    """An installed service that can't be used; the text says why, and what to do."""


class Service(Protocol):
    """One running service. `start`, `drain` and `stop` are called once each, in this order.

    The constructor only stores what it is given. `start` does I/O and returns when the service serves;
    whatever it needs from other services it waits for in the background, so that nodes may start in any
    order. `drain` takes nothing new and hands over; `stop` is the reverse of `start` and never raises for
    what is gone already.
    """

    async def start(self) -> None: ...

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Context:
    """All that a service may use of its process."""

    options: Options
    # This node, as it stands in its row.
    node: Node
    # The node's side of membership: the present view, and waiting for a later one.
    member: Member
    # Channels to other nodes and to services of this process.
    channels: Channels
    # Where servicers are added; only while building.
    server: ClusterServer
    # The shared database; only where `ServiceSpec.database` says that the service needs it.
    database: Database
    # Owner of the service's background tasks; a task that dies unexpectedly ends the process.
    tasks: Tasks
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """What the runner must know of a service before it is imported."""

    name: str
    # "package.module:function", called with the `Context`, returning a `Service`. A string, so that
    # looking a service up does not import it.
    build: str
    # Whether it needs the shared database.
    database: bool = False
    # Options that it understands beside the general ones.
    options: tuple[Option, ...] = ()

    def load(self) -> Callable[[Context], Service]:
        module, _, name = self.build.partition(":")
        return cast("Callable[[Context], Service]", getattr(importlib.import_module(module), name))


# Started in this order, stopped in reverse: a registry can be joined before a router needs it.
# Services of outsiders come between pubsub and connector.
ORDER = ("registry", "router", "pubsub")
LAST = "connector"


def installed() -> dict[str, ServiceSpec]:
    """The services that are installed, by name, in starting order."""
    found: dict[str, ServiceSpec] = {}
    for entry in entry_points(group=GROUP):
        loaded: Any = _load(entry)
        if entry.name in found:
            raise ServiceProblem(f"two installed packages offer a service named {entry.name!r}")
        found[entry.name] = loaded
    return dict(sorted(found.items(), key=lambda item: _rank(item[0])))


def _load(entry: Any) -> ServiceSpec:
    try:
        return cast(ServiceSpec, entry.load())
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "services":
            raise ServiceProblem(
                f"the service {entry.name!r} cannot be imported ({error}): another package named 'services' with "
                "an __init__.py stands earlier on the Python path and hides Tidings' own; remove its __init__.py, "
                "or call it something else"
            ) from error
        raise


def _rank(name: str) -> tuple[int, str]:
    if name in ORDER:
        return ORDER.index(name), name
    return (len(ORDER) + (name == LAST), name)
