"""Errors that carry their wire condition (RFC 6120 4.9, 6.5, 8.3).

A condition that no RFC defines is a mistake of ours and raises ValueError where it is made.
"""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from tidings.xmpp import ns

# RFC 6120 4.9.3.
STREAM_CONDITIONS = frozenset(
    (
        "bad-format", "bad-namespace-prefix", "conflict", "connection-timeout", "host-gone", "host-unknown",
        "improper-addressing", "internal-server-error", "invalid-from", "invalid-namespace", "invalid-xml",
        "not-authorized", "not-well-formed", "policy-violation", "remote-connection-failed", "reset",
        "resource-constraint", "restricted-xml", "see-other-host", "system-shutdown", "undefined-condition",
        "unsupported-encoding", "unsupported-feature", "unsupported-stanza-type", "unsupported-version",
    )
)  # fmt: skip

# RFC 6120 8.3.3, each with the type that it SHOULD have (8.3.3.x).
STANZA_CONDITIONS = {
    "bad-request": "modify",
    "conflict": "cancel",
    "feature-not-implemented": "cancel",
    "forbidden": "auth",
    "gone": "cancel",
    "internal-server-error": "cancel",
    "item-not-found": "cancel",
    "jid-malformed": "modify",
    "not-acceptable": "modify",
    "not-allowed": "cancel",
    "not-authorized": "auth",
    "policy-violation": "modify",
    "recipient-unavailable": "wait",
    "redirect": "modify",
    "registration-required": "auth",
    "remote-server-not-found": "cancel",
    "remote-server-timeout": "wait",
    "resource-constraint": "wait",
    "service-unavailable": "cancel",
    "subscription-required": "auth",
    "undefined-condition": "cancel",
    "unexpected-request": "wait",
}
ERROR_TYPES = frozenset(("auth", "cancel", "continue", "modify", "wait"))

# RFC 6120 6.5.
SASL_CONDITIONS = frozenset(
    (
        "aborted", "account-disabled", "credentials-expired", "encryption-required", "incorrect-encoding",
        "invalid-authzid", "invalid-mechanism", "malformed-request", "mechanism-too-weak", "not-authorized",
        "temporary-auth-failure",
    )
)  # fmt: skip


class StreamError(Exception):
    """An error that ends the stream (RFC 6120 4.9).

    `content` is the text of the condition element itself, which only see-other-host has (4.9.3.19);
    `application` an element of our own beside it.
    """

    def __init__(self, condition: str, text: str = "", *, content: str = "", application: bytes = b"") -> None:
        if condition not in STREAM_CONDITIONS:
            raise ValueError(f"no such stream error: {condition!r}")
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text
        self.content = content
        self.application = application

    def to_xml(self) -> bytes:
        """The <stream:error/> element."""
        body = _condition(self.condition, ns.STREAM_ERRORS, self.content) + _text(self.text, ns.STREAM_ERRORS)
        return b"<stream:error>%b%b</stream:error>" % (body.encode(), self.application)


class StanzaError(Exception):
    """An error that answers a stanza (RFC 6120 8.3)."""

    def __init__(self, condition: str, text: str = "", *, type: str = "", application: bytes = b"") -> None:
        if condition not in STANZA_CONDITIONS:
            raise ValueError(f"no such stanza error: {condition!r}")
        if type and type not in ERROR_TYPES:
            raise ValueError(f"no such error type: {type!r}")
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text
        self.type = type or STANZA_CONDITIONS[condition]
        self.application = application

    def to_xml(self) -> bytes:
        """The <error/> element."""
        body = _condition(self.condition, ns.STANZA_ERRORS, "") + _text(self.text, ns.STANZA_ERRORS)
        return b"<error type='%b'>%b%b</error>" % (self.type.encode(), body.encode(), self.application)


class SaslError(Exception):
    """An authentication that failed (RFC 6120 6.4.5). The stream goes on, and may try again."""

    def __init__(self, condition: str, text: str = "") -> None:
        if condition not in SASL_CONDITIONS:
            raise ValueError(f"no such SASL error: {condition!r}")
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text

    def to_xml(self) -> bytes:
        """The <failure/> element."""
        text = f"<text xml:lang='en'>{escape(self.text)}</text>" if self.text else ""
        return f"<failure xmlns='{ns.SASL}'><{self.condition}/>{text}</failure>".encode()


def _condition(name: str, namespace: str, content: str) -> str:
    if content:
        return f"<{name} xmlns='{namespace}'>{escape(content)}</{name}>"
    return f"<{name} xmlns='{namespace}'/>"


def _text(text: str, namespace: str) -> str:
    return f"<text xmlns={quoteattr(namespace)} xml:lang='en'>{escape(text)}</text>" if text else ""
