"""A connector in another process is not believed (DESIGN 3)."""

from __future__ import annotations

import pytest

from services.router.connector_link import _verified
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import IQ, MESSAGE

JID = "romeo@example.org/orchard"
GOOD = (
    b"<message from='romeo@example.org/orchard' to='juliet@example.org' type='chat' id='1'><body>x</body></message>"
)


def test_routing_fields_come_from_the_bytes() -> None:
    envelope = Envelope(kind=IQ, type="lie", id="lie", to_jid="tybalt@example.org", children=["lie"], stanza=GOOD)
    assert _verified(envelope, JID)
    assert (envelope.kind, envelope.type, envelope.id) == (MESSAGE, "chat", "1")
    assert (envelope.to_jid, list(envelope.children)) == ("juliet@example.org", ["body"])


@pytest.mark.parametrize(
    "raw",
    [
        GOOD.replace(b"romeo@", b"tybalt@"),
        GOOD.replace(b" from='romeo@example.org/orchard'", b""),
        GOOD + GOOD,
        GOOD + b"<",
        b"",
        b"<letter from='romeo@example.org/orchard'/>",
        GOOD.replace(b"<body>", b"<!-- x --><body>"),
        GOOD.replace(b"x</body>", b"\xff</body>"),
        b"</stream:stream>",
    ],
)
def test_what_is_not_one_stanza_of_the_session_is_refused(raw: bytes) -> None:
    assert not _verified(Envelope(stanza=raw), JID)
    assert _verified(Envelope(stanza=GOOD), JID), "the next one is not harmed"
