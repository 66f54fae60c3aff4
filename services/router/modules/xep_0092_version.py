"""XEP-0092: Software Version. The operating system is nobody's business (XEP-0092 7)."""

from __future__ import annotations

from tidings import __version__
from tidings.kit.module import Module, ModuleSpec
from tidings.xmpp import ns
from tidings.xmpp.stanza import escape_text


def load(module: Module) -> None:
    answer = (
        f"<query xmlns='{ns.VERSION}'><name>Tidings</name><version>{escape_text(__version__)}</version></query>"
    ).encode()
    module.feature(ns.VERSION)
    module.on_iq(f"{{{ns.VERSION}}}query", lambda _iq: answer, types=("get",))


MODULE = ModuleSpec("version", load, xep="XEP-0092", version="1.1")
