"""Stanzas as bytes: their routing fields, the sender's stamp, and templates for what a server says.

Forwarding builds no tree: a stanza stays the bytes that its sender wrote. Between services it is one
self-contained element whose default namespace is jabber:client without saying so.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast
from xml.sax.saxutils import escape as escape_text
from xml.sax.saxutils import quoteattr

from lxml import etree

from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError

# How expat names the attribute xml:lang.
XML_LANG = f"{ns.XML} lang"

# A start tag, with quoted values that may hold ">".
START_TAG = re.compile(rb"""<[^'">]+(?:'[^']*'[^'">]*|"[^"]*"[^'">]*)*>""")
_FROM = re.compile(rb"""\sfrom\s*=\s*(?:'[^']*'|"[^"]*")""")
_NAME = re.compile(rb"<[^\s/>]+")

STANZAS = frozenset(("message", "presence", "iq"))


class Element(NamedTuple):
    """A first-level element of a stream."""

    # "message" in jabber:client, "{namespace}name" elsewhere.
    name: str
    # Attributes by name; those in a namespace as expat has them, "namespace name" (see XML_LANG).
    attrs: dict[str, str]
    # The names of its children, in the notation of `name`.
    children: tuple[str, ...]
    # Its bytes as they came, with the prefixes of the stream header that it uses.
    raw: bytes


class Stamp:
    """Forces the sender's address and language into the stanzas of one session.

    RFC 6120 8.1.2.1 has the server put in (or replace) `from`; 8.1.5 the stream's language where the stanza
    has none.
    """

    __slots__ = ("_both", "_from", "_lang", "from_jid")

    def __init__(self, from_jid: str, lang: str) -> None:
        self.from_jid = from_jid
        self._from = b" from=" + quoteattr(from_jid).encode()
        self._lang = b" xml:lang=" + quoteattr(lang).encode() if lang else b""
        self._both = self._from + self._lang

    def apply(self, element: Element) -> bytes:
        """The element's bytes with the stamp."""
        attrs = element.attrs
        raw = element.raw
        end = len(element.name) + 1
        if "from" not in attrs:
            return raw[:end] + (self._from if XML_LANG in attrs else self._both) + raw[end:]
        if attrs["from"] != self.from_jid:
            match = START_TAG.match(raw)
            assert match is not None
            head = _FROM.sub(b"", raw[: match.end()], count=1)
            raw = head[:end] + self._from + head[end:] + raw[match.end() :]
        if self._lang and XML_LANG not in attrs:
            raw = raw[:end] + self._lang + raw[end:]
        return raw


def declare(raw: bytes, declarations: bytes) -> bytes:
    """Puts namespace declarations into an element's start tag."""
    match = _NAME.match(raw)
    assert match is not None
    return raw[: match.end()] + declarations + raw[match.end() :]


def append(raw: bytes, child: bytes) -> bytes:
    """Puts one more child into a stanza, as its last."""
    # The last "</" is the stanza's own, for no value and no text holds a "<"; an empty element has none.
    end = raw.rfind(b"</")
    if end >= 0:
        return raw[:end] + child + raw[end:]
    match = _NAME.match(raw)
    assert match is not None
    return b"%b>%b</%b>" % (raw[:-2], child, match.group()[1:])


# --- trees, for those who consume a stanza ---

_TREES = etree.XMLParser(
    resolve_entities=False,
    no_network=True,
    load_dtd=False,
    huge_tree=False,
    remove_comments=True,
    remove_pis=True,
)
_OPEN = b"<s xmlns='jabber:client'>"


def to_tree(raw: bytes) -> etree._Element:
    """The tree of a stanza; elements without a namespace of their own are in jabber:client.

    The bytes have been through expat before: what restricted XML forbids is not in them.
    """
    return etree.fromstring(_OPEN + raw + b"</s>", _TREES)[0]


def to_bytes(tree: etree._Element) -> bytes:
    """The reverse: without a declaration of jabber:client, and self-contained otherwise."""
    written = etree.tostring(tree, encoding="utf-8", with_tail=False)
    return written.replace(b' xmlns="jabber:client"', b"", 1)


# --- templates ---


def attribute(name: str, value: str) -> str:
    """` name='value'`, or nothing for an empty value."""
    return f" {name}={quoteattr(value)}" if value else ""


def iq_result(id_: str, to: str, from_: str, payload: bytes = b"") -> bytes:
    """The answer to an IQ request (RFC 6120 8.2.3); addresses that are '' are left out."""
    head = f"<iq type='result'{attribute('id', id_)}{attribute('from', from_)}{attribute('to', to)}"
    if not payload:
        return f"{head}/>".encode()
    return b"%b>%b</iq>" % (head.encode(), payload)


def error_stanza(kind: str, id_: str, error: StanzaError, *, from_: str, to: str) -> bytes:
    """The answer that says what was wrong (RFC 6120 8.3.1), without the stanza that it answers."""
    head = f"<{kind} type='error'{attribute('id', id_)}{attribute('from', from_)}{attribute('to', to)}>"
    return b"%b%b</%b>" % (head.encode(), error.to_xml(), kind.encode())


def local_name(tree: etree._Element) -> str:
    """The name of an element without its namespace."""
    return etree.QName(cast(Any, tree.tag)).localname


def namespace(tree: etree._Element) -> str:
    return etree.QName(cast(Any, tree.tag)).namespace or ""


__all__ = [
    "STANZAS",
    "START_TAG",
    "XML_LANG",
    "Element",
    "Stamp",
    "append",
    "attribute",
    "declare",
    "error_stanza",
    "escape_text",
    "iq_result",
    "local_name",
    "namespace",
    "quoteattr",
    "to_bytes",
    "to_tree",
]
