"""XEP-0297: Stanza Forwarding: one stanza within another."""

from __future__ import annotations

import re

from tidings.xmpp import ns
from tidings.xmpp.delays import delay
from tidings.xmpp.stanza import declare

# A start tag that says its default namespace.
_QUALIFIED = re.compile(rb"""<[^\s/>]+(?:\s+[^\s=<>]+\s*=\s*(?:'[^']*'|"[^"]*"))*?\s+xmlns\s*=""")

_CLIENT = f" xmlns='{ns.CLIENT}'".encode()
_OPEN = f"<forwarded xmlns='{ns.FORWARD}'>".encode()


def forwarded(raw: bytes, received_unix_ms: int | None = None) -> bytes:
    """The <forwarded/> around a stanza, with the time at which it came (XEP-0203), if that is to be told."""
    if _QUALIFIED.match(raw) is None:
        # 3: its namespace must be kept, and it would inherit another one here.
        raw = declare(raw, _CLIENT)
    when = delay(received_unix_ms) if received_unix_ms is not None else b""
    return b"%b%b%b</forwarded>" % (_OPEN, when, raw)
