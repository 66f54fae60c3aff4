"""Tickets: rights that routers give to connectors and that only routers can read (DESIGN 3).

A connector cannot name an account itself. A stream that goes to another router carries a ticket: that it is
authenticated as an account, or that a session is its own.
"""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError

from tidings.api.common.v1.session_pb2 import Ticket

NONCE_BYTES = 12


class Tickets:
    """Seals and opens tickets with a key that all routers of the cluster share, and nobody else has."""

    def __init__(self) -> None:
        self._cipher: AESGCM | None = None

    def start(self, key: bytes) -> None:
        """`key`: 32 bytes."""
        self._cipher = AESGCM(key)

    def seal(
        self, connector: str, account: str, session: str = "", epoch: int = 0, moves: int = 0, resume: bytes = b"",
        router: str = "",
    ) -> bytes:  # fmt: skip
        """A ticket for one start of a connector."""
        assert self._cipher is not None
        ticket = Ticket(
            session=session, account=account, epoch=epoch, connector_incarnation=connector, moves=moves,
            resume=resume, router_incarnation=router,
        )  # fmt: skip
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, ticket.SerializeToString(), None)

    def open(self, sealed: bytes, connector: str) -> Ticket | None:
        """The ticket; None when it is none, or was given to another start of a connector."""
        assert self._cipher is not None
        try:
            content = self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
            ticket = Ticket.FromString(content)
        except (InvalidTag, ValueError, DecodeError):
            return None
        return ticket if ticket.connector_incarnation == connector else None
