"""Tells whoever started this process that it serves: systemd, or `tidings run --processes` (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from tidings.kit.logging import get_logger

log = get_logger("server")

VARIABLE = "NOTIFY_SOCKET"
READY = b"READY=1"


def tell_ready() -> None:
    """Says that this process serves, where somebody wants to know."""
    address = os.environ.get(VARIABLE, "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        try:
            # An @ stands for the zero byte of an abstract address.
            sending.connect("\0" + address[1:] if address.startswith("@") else address)
            sending.send(READY)
        except OSError as error:
            log.warning("not_notified", reason=str(error))
