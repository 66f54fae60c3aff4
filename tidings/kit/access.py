"""Who may call what on the cluster port: a table, checked on every call."""

from __future__ import annotations

from tidings.kit.identity import Caller

_API = "tidings.api"

# By method, or by service for all methods of it. "node" is any live node, "node:router" one with that
# service; "joiner" a process that may become a node; "client" a named program, "client:nodes" one with that
# scope. What is not here is refused.
ACCESS: dict[str, tuple[str, ...]] = {
    f"{_API}.registry.v1.RegistryService/Join": ("joiner", "node"),
    f"{_API}.registry.v1.RegistryService/Beat": ("joiner", "node"),
    f"{_API}.registry.v1.RegistryService/Leave": ("joiner", "node"),
    f"{_API}.registry.v1.RegistryService/ListNodes": ("joiner", "node", "client"),
    f"{_API}.registry.v1.RegistryService/WatchNodes": ("joiner", "node", "client"),
    f"{_API}.registry.v1.RegistryService/ReportUnreachable": ("node",),
    f"{_API}.registry.v1.RegistryService/CheckReached": ("node",),
    f"{_API}.registry.v1.RegistryService/DrainNode": ("client:nodes",),
    f"{_API}.node.v1.NodeService": ("node:registry",),
    f"{_API}.router.v1.RouterService/Attach": ("node:connector",),
    f"{_API}.router.v1.RouterService/Forward": ("node:router",),
    f"{_API}.router.v1.RouterService/AdoptSession": ("node:router",),
    f"{_API}.router.v1.RouterService/EndSession": ("node:router",),
    f"{_API}.router.v1.AccountService": ("client:accounts",),
    f"{_API}.connector.v1.ConnectorService": ("node:router", "client:nodes"),
    f"{_API}.component.v1.ComponentService": ("node", "client:component"),
    f"{_API}.pubsub.v1.PubsubService": ("client",),
    "grpc.health.v1.Health": ("joiner", "node", "client"),
    "grpc.reflection.v1alpha.ServerReflection": ("joiner", "node", "client"),
}


def allowed(method: str, caller: Caller) -> bool:
    """Whether a caller may call "package.Service/Method"."""
    if caller.kind == "local":
        return True
    entries = ACCESS.get(method) or ACCESS.get(method.partition("/")[0]) or ()
    for entry in entries:
        kind, _, service = entry.partition(":")
        if kind == caller.kind and (not service or service in caller.services):
            return True
    return False
