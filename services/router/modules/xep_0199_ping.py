"""XEP-0199: XMPP Ping."""

from __future__ import annotations

from tidings.kit.module import Module, ModuleSpec, Where
from tidings.xmpp import ns


def load(module: Module) -> None:
    module.feature(ns.PING, Where.SERVER, Where.ACCOUNT)
    module.on_iq(f"{{{ns.PING}}}ping", lambda _iq: b"", types=("get",), where=(Where.SERVER, Where.ACCOUNT))


MODULE = ModuleSpec("ping", load, xep="XEP-0199", version="2.0.1")
