"""The routing fields of an envelope, taken from its bytes: another process is not believed, or has not said them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidings.kit.module import KINDS, NONZA
from tidings.xmpp.errors import StreamError
from tidings.xmpp.parser import parse_stanza

if TYPE_CHECKING:
    from tidings.api.common.v1.stanza_pb2 import Envelope
    from tidings.xmpp.stanza import Element


def fill(envelope: Envelope) -> Element | None:
    """Puts them in, but for `from`; the element, or None when the bytes are not one."""
    try:
        element = parse_stanza(envelope.stanza)
    except StreamError:
        return None
    attrs = element.attrs
    if element.name.startswith("{"):
        envelope.kind, envelope.type, envelope.id = NONZA, element.name, attrs.get("h", "")
        return element
    envelope.kind = KINDS.get(element.name, NONZA)
    envelope.type = attrs.get("type", "")
    envelope.id = attrs.get("id", "")
    envelope.to_jid = attrs.get("to", "")
    del envelope.children[:]
    envelope.children.extend(element.children)
    return element


def verified(envelope: Envelope, from_jid: str | None) -> bool:
    """Puts the routing fields of the bytes into the envelope; False when the bytes are not what they must be.

    `from_jid`: the session's, which must be in it; None before there is a session, when it may be any element.
    """
    element = fill(envelope)
    envelope.answers = 0
    if element is None:
        return False
    if from_jid is None or element.name.startswith("{"):
        return True
    return element.name in KINDS and element.attrs.get("from") == from_jid
