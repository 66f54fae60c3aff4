"""XEP-0203: Delayed Delivery: when a stanza came that is delivered later."""

from __future__ import annotations

from tidings.xmpp import datetimes, ns
from tidings.xmpp.stanza import attribute


def delay(received_unix_ms: int, from_: str = "") -> bytes:
    """4; `from_`: who says so, where that is to be told."""
    stamp = datetimes.to_text(received_unix_ms)
    return f"<delay xmlns='{ns.DELAY}'{attribute('from', from_)} stamp='{stamp}'/>".encode()
