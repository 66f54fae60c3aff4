"""XEP-0202: Entity Time, in the formats of XEP-0082."""

from __future__ import annotations

import datetime

from tidings.kit.module import Module, ModuleSpec, Stanza
from tidings.xmpp import ns


def load(module: Module) -> None:
    module.feature(ns.TIME)
    module.on_iq(f"{{{ns.TIME}}}time", _now, types=("get",))


MODULE = ModuleSpec("time", load, xep="XEP-0202", version="2.0")


def _now(_iq: Stanza) -> bytes:
    now = datetime.datetime.now().astimezone()
    offset = now.strftime("%z")
    utc = now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"<time xmlns='{ns.TIME}'><tzo>{offset[:3]}:{offset[3:5]}</tzo><utc>{utc}</utc></time>".encode()
