"""What a client sends before its session is bound, as its router is told of it (router.v1 StreamEvent)."""

from __future__ import annotations

from typing import Any

from tidings.api.router.v1.router_pb2 import StreamEvent
from tidings.kit.module import KINDS, NONZA
from tidings.xmpp.events import NonzaReceived, SaslAborted, SaslInitiated, SaslResponded, StanzaReceived


def tell(to_router: StreamEvent, event: Any) -> None:
    """Fills in an event of SASL (RFC 6120 6.4), or an element."""
    kind = type(event)
    if kind is SaslInitiated:
        to_router.sasl_initiate.mechanism = event.mechanism
        to_router.sasl_initiate.has_data = event.data is not None
        to_router.sasl_initiate.data = event.data or b""
    elif kind is SaslResponded:
        to_router.sasl_response.data = event.data
    elif kind is SaslAborted:
        to_router.sasl_abort.SetInParent()
    elif kind is StanzaReceived or kind is NonzaReceived:
        element = event.element
        stanza = to_router.stanza
        stanza.kind = KINDS.get(element.name, NONZA)
        stanza.type = element.attrs.get("type", "") if element.name in KINDS else element.name
        stanza.id = element.attrs.get("id" if element.name in KINDS else "h", "")
        stanza.to_jid = element.attrs.get("to", "")
        stanza.children.extend(element.children)
        stanza.stanza = element.raw if kind is NonzaReceived else event.stamped
