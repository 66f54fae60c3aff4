"""RFC 3921 3: the session request of old clients, which has meant nothing since RFC 6121."""

from __future__ import annotations

from tidings.kit.module import Module, ModuleSpec, Where
from tidings.xmpp import ns


def load(module: Module) -> None:
    module.stream_feature(lambda _host: b"<session xmlns='%b'><optional/></session>" % ns.SESSION.encode())
    module.on_iq(f"{{{ns.SESSION}}}session", lambda _iq: b"", types=("set",), where=(Where.SERVER, Where.ACCOUNT))


MODULE = ModuleSpec("session", load, xep="RFC 3921", version="3")
