"""Whose presence was shown here of late.

A session has ended at a router that is slow to say so, or was cut off, and the next one of its full JID is at another
router: its presence may come here first. The goodbye of the one before is for nobody then (RFC 6121 4.5.2): who saw
that one sees its successor, and would take it for gone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidings.api.common.v1.stanza_pb2 import Envelope

# Seconds for which it is remembered: longer than a goodbye may be under way; and of how many full JIDs, of more those
# are forgotten that were shown first. It stops those who come and go from filling memory.
RECENT = 60.0
MOST = 10_000


class Shown:
    """What sessions of this router were shown. One for each router."""

    def __init__(self) -> None:
        # By full JID, in the order in which they were shown: the session, and when.
        self._by_jid: dict[str, tuple[str, float]] = {}

    def is_late(self, envelope: Envelope) -> bool:
        """Takes presence that a session has broadcast, and that is given to somebody here: whether it is the goodbye
        of one whose successor was shown before."""
        jid, origin = envelope.from_jid, envelope.origin
        if not origin:
            return False
        if envelope.type == "":
            self._by_jid.pop(jid, None)
            self._by_jid[jid] = origin, time.monotonic()
            if len(self._by_jid) > MOST:
                del self._by_jid[next(iter(self._by_jid))]
            return False
        if envelope.type != "unavailable" or jid not in self._by_jid:
            return False
        shown, since = self._by_jid[jid]
        return shown != origin and time.monotonic() < since + RECENT
