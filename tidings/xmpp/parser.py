"""Bytes to first-level elements.

expat says where an element ends and whether all is well-formed; the element's bytes are sliced out as they
came. Restricted XML (RFC 6120 11.1) and the limits live here, so that no transport can forget them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pyexpat import ExpatError, ParserCreate, XMLParserType, errors
from typing import Any, NamedTuple

from tidings.xmpp import ns
from tidings.xmpp.errors import StreamError
from tidings.xmpp.stanza import START_TAG, Element, declare, quoteattr

# Bytes of one start tag: expat reads an unfinished tag again at every call, so a long one that comes in
# crumbs would cost the square of its length. JIDs are at most 3,071 bytes; nothing else is long.
MAX_TAG_BYTES = 16_384

# Ever-new names fill expat's and our tables, which only a new parser empties: it is renewed when it has
# interned so many. A client that behaves uses some hundred.
MAX_NAMES = 4_000

_STREAM_NAME = f"{ns.STREAMS} stream"
_TAG = {name: f"<{name}".encode() for name in ("message", "presence", "iq")}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an element may be. 0 switches a limit off."""

    # Bytes of one element: stops one client from filling memory (RFC 6120 13.12 asks for 10,000 at least).
    stanza_bytes: int = 262_144
    # Elements within elements: stops trees so deep that whoever walks them runs out of stack.
    depth: int = 128
    # Attributes of one element: stops hash tables and loops from growing by a tag.
    attributes: int = 64


class StreamHeader(NamedTuple):
    """The stream has begun (RFC 6120 4.2)."""

    attrs: dict[str, str]


class StreamFooter(NamedTuple):
    """The client has closed its stream (RFC 6120 4.4)."""


Parsed = Element | StreamHeader | StreamFooter


class _Halt(Exception):
    """An element is complete, and what follows waits."""


class StreamParser:
    """One stream's bytes in, elements out.

    While `halting` is set, `feed` returns after the header and after each element, and keeps the bytes behind it:
    the answer to an element may be that a new stream begins there (`restart`). `feed(b"")` goes on.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.halting = False
        # What is wrong with the stream; set when `feed` has returned all that was in order before it.
        self.error: StreamError | None = None
        # Fed and not parsed: behind the element after which the parser halted.
        self._rest = b""
        self._halted = False
        self._header = b""
        # Prefixes that the header declares, as declarations for stanzas that use them.
        self._prefixes: list[tuple[bytes, re.Pattern[bytes], bytes]] = []
        self._out: list[Parsed] = []
        # The bytes from the end of the last complete element on; `_last` is that end within them.
        self._data = b""
        self._last = 0
        self._expat: XMLParserType = None  # type: ignore[assignment]
        self._open()

    # --- for the owner ---

    @property
    def waiting(self) -> int:
        """Bytes that wait for the next `feed`."""
        return len(self._rest)

    @property
    def idle(self) -> bool:
        """Whether the stream is open and nothing in it is unfinished."""
        return self._depth == 1 and self._last == len(self._data) and not self._rest

    def restart(self) -> None:
        """A new stream begins with the bytes that follow (RFC 6120 6.4.6)."""
        self._header = b""
        self._prefixes = []
        self._halted = False
        self._open()

    def release(self) -> None:
        """The stream is over: gives back expat, whose handlers hold this parser as this holds it."""
        self.error = self.error or StreamError("undefined-condition", "the stream is over")
        self._rest = self._data = b""
        for handler in _HANDLERS:
            setattr(self._expat, handler, None)

    def keep(self, data: bytes) -> None:
        """Puts bytes behind those that wait, unparsed."""
        self._rest += data

    def discard(self) -> None:
        """Forgets what waits: it was sent before the client could know what it is read as."""
        self._rest = b""

    def feed(self, data: bytes) -> list[Parsed]:
        """Parses bytes; gives what became complete. Afterwards `error` says whether the stream is at fault."""
        if self.error is not None:
            return []
        if self._rest:
            data, self._rest = self._rest + data, b""
        if self._halted:
            self._halted = False
            self._renew(b"")
        if not self._header and not self._data:
            # Clients end <auth/> with a line break, which then stands before the header of the next stream.
            data = data.lstrip(b" \t\r\n")
        out: list[Parsed] = []
        self._out = out
        if data:
            try:
                self._parse(data)
            except StreamError as error:
                self.error = error
            except _Halt:
                self._halted = True
                self._rest = self._data[self._last :]
                self._data = b""
        return out

    # --- the work ---

    def _open(self) -> None:
        """A new expat, before the stream header."""
        if self._expat is not None:
            for handler in _HANDLERS:
                setattr(self._expat, handler, None)
        expat = ParserCreate("utf-8", " ")
        if hasattr(expat, "SetReparseDeferralEnabled"):
            # expat 2.6 and later keep events back until more bytes come; MAX_TAG_BYTES guards us instead.
            expat.SetReparseDeferralEnabled(False)
        expat.StartElementHandler = self._make_start()
        expat.EndElementHandler = self._end
        expat.XmlDeclHandler = self._declaration
        expat.StartDoctypeDeclHandler = _restricted
        expat.CommentHandler = _restricted
        expat.ProcessingInstructionHandler = _restricted
        expat.EntityDeclHandler = _restricted
        self._expat = expat
        self._names: dict[str, str] = {}
        # The bytes from the end of the last complete element on, and where they begin in expat's count.
        self._data = b""
        self._base = 0
        self._last = 0
        self._depth = 0
        self._start = 0
        self._name = ""
        self._attrs: dict[str, str] = {}
        self._children: list[str] = []
        self._leaf = True

    def _parse(self, data: bytes) -> None:
        kept = len(self._data)
        if self._last < kept:
            # An unfinished element stays until it is complete.
            self._base += self._last
            self._start -= self._last
            self._data = self._data[self._last :] + data
        else:
            self._base += kept
            self._data = data
        self._last = 0
        try:
            self._expat.Parse(data, False)
        except ExpatError as error:
            raise self._explained(error) from None
        size = len(self._data)
        if self._last == size:
            pass
        elif self._depth == 1 and not self._data[self._last :].strip():
            self._last = size  # white space keep-alive (RFC 6120 4.6.1)
        else:
            self._check_unfinished(size)
        if len(self._expat.intern) > MAX_NAMES and self._depth:
            self._renew(self._data[self._last :])

    def _check_unfinished(self, size: int) -> None:
        limit = self.limits.stanza_bytes
        if limit and size - self._last > limit:
            raise StreamError("policy-violation", f"an element of more than {limit} bytes")
        if self._base + size - self._expat.CurrentByteIndex > MAX_TAG_BYTES:
            raise StreamError("policy-violation", f"a tag of more than {MAX_TAG_BYTES} bytes")
        if self._depth == 1 and not self._data[self._last :].lstrip().startswith(b"<"):
            raise StreamError("bad-format", "text between stanzas")

    def _renew(self, unfinished: bytes) -> None:
        """A new expat in the same stream: it gets the header again, silently, and what was unfinished."""
        self._open()
        out, self._out = self._out, []
        header = self._header
        self._data = header
        self._expat.Parse(header, False)
        self._last = len(header)
        self._out = out
        if unfinished:
            self._parse(unfinished)

    def _make_start(self) -> Callable[[str, dict[str, str]], None]:
        def start(name: str, attrs: dict[str, str]) -> None:
            depth = self._depth
            if depth > 1:
                if depth == 2:
                    self._children.append(self._names.get(name) or self._named(name))
                self._leaf = False
                limits = self.limits
                if limits.depth and depth > limits.depth:
                    raise StreamError("policy-violation", f"elements more than {limits.depth} deep")
                if len(attrs) > limits.attributes > 0:
                    raise StreamError("policy-violation", f"more than {limits.attributes} attributes")
            elif depth == 1:
                position = self._expat.CurrentByteIndex - self._base
                if position != self._last and self._data[self._last : position].strip():
                    raise StreamError("bad-format", "text between stanzas")
                if len(attrs) > self.limits.attributes > 0:
                    raise StreamError("policy-violation", f"more than {self.limits.attributes} attributes")
                if name == _STREAM_NAME:
                    raise StreamError("bad-format", "a stream within a stream")
                self._start = position
                self._name = self._names.get(name) or self._named(name)
                self._attrs = attrs
                self._children = []
                self._leaf = True
            else:
                self._header_started(name, attrs)
            self._depth = depth + 1

        return start

    def _end(self, name: str) -> None:
        depth = self._depth = self._depth - 1
        if depth > 1:
            return
        if depth == 0:
            self._last = len(self._data)
            self._out.append(StreamFooter())
            return
        data = self._data
        start = self._start
        end = self._expat.CurrentByteIndex - self._base
        # At an end tag expat stands before "</"; behind an empty element it stands past "/>".
        if not (self._leaf and data[end - 2] == 0x2F and self._is_empty_element(start, end)):
            end = data.index(b">", end) + 1
        self._last = end
        limit = self.limits.stanza_bytes
        if limit and end - start > limit:
            raise StreamError("policy-violation", f"an element of more than {limit} bytes")
        raw = data[start:end]
        name = self._name
        if name in _TAG:
            if not raw.startswith(_TAG[name]):
                raise StreamError("bad-namespace-prefix", "stanzas have no prefix")
        for prefix, declared, declaration in self._prefixes:
            if prefix in raw and not declared.search(raw):
                raw = declare(raw, declaration)
        self._out.append(Element(name, self._attrs, tuple(self._children), raw))
        if self.halting:
            raise _Halt

    def _is_empty_element(self, start: int, end: int) -> bool:
        tag = START_TAG.match(self._data, start)
        return tag is not None and tag.end() == end

    def _header_started(self, name: str, attrs: dict[str, str]) -> None:
        if self._header:
            return  # the parser was renewed; nobody is told
        position = self._expat.CurrentByteIndex - self._base
        tag = START_TAG.match(self._data, position)
        if tag is None or tag.end() - position > MAX_TAG_BYTES:
            raise StreamError("policy-violation", f"a tag of more than {MAX_TAG_BYTES} bytes")
        if name != _STREAM_NAME:
            # RFC 6120 4.8.1, 4.9.3.10, 4.9.3.1.
            if name.rpartition(" ")[2] == "stream":
                raise StreamError("invalid-namespace", "the stream is not in the streams namespace")
            raise StreamError("bad-format", "a stream begins with <stream:stream>")
        header = tag.group()
        self._header = header[:-2] + b">" if header.endswith(b"/>") else header
        self._last = tag.end()
        declared = re.findall(rb"""\sxmlns(?::([^\s=]+))?\s*=\s*(?:'([^']*)'|"([^"]*)")""", header)
        default = ""
        for prefix, single, double in declared:
            uri = (single or double).decode()
            if not prefix:
                default = uri
            else:
                self._prefixes.append(
                    (
                        prefix + b":",
                        re.compile(rb"""^<[^>]*\sxmlns:%b\s*=""" % re.escape(prefix)),
                        b" xmlns:%b=%b" % (prefix, quoteattr(uri).encode()),
                    )
                )
        if default != ns.CLIENT:
            # 4.8.2: the content namespace of a client's stream; no default at all is the same mistake.
            raise StreamError("invalid-namespace", "the default namespace of a client's stream is jabber:client")
        self._out.append(StreamHeader(attrs))
        if self.halting and self._last < len(self._data):
            raise _Halt

    def _named(self, name: str) -> str:
        """expat's "namespace name" in our notation."""
        uri, space, local = name.rpartition(" ")
        named = local if uri == ns.CLIENT else f"{{{uri}}}{local}" if space else f"{{}}{local}"
        self._names[name] = named
        return named

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        # RFC 6120 11.6.
        if encoding is not None and encoding.upper() != "UTF-8":
            raise StreamError("unsupported-encoding", "a stream is UTF-8")

    def _explained(self, error: ExpatError) -> StreamError:
        """The stream error for what expat refuses."""
        if error.code == _UNDEFINED_ENTITY:
            return StreamError("restricted-xml", "an entity that XML does not define")
        try:
            # A character may be cut off at the end, and everything before _last was read already.
            self._data[self._last :].decode()
        except UnicodeDecodeError as decoding:
            if "unexpected end" not in decoding.reason:
                return StreamError("unsupported-encoding", "bytes that are not UTF-8")
        return StreamError("not-well-formed", errors.messages.get(error.code, ""))


_HANDLERS = (
    "StartElementHandler",
    "EndElementHandler",
    "XmlDeclHandler",
    "StartDoctypeDeclHandler",
    "CommentHandler",
    "ProcessingInstructionHandler",
    "EntityDeclHandler",
)
_UNDEFINED_ENTITY = errors.codes[errors.XML_ERROR_UNDEFINED_ENTITY]


def _restricted(*_: Any) -> None:
    # RFC 6120 11.1.
    raise StreamError("restricted-xml", "no DTD, comment or processing instruction in a stream")


class StanzaParser:
    """Checks single stanzas as a stream's bytes are checked: for bytes that come from another process.

    Keeps one expat for all of them; whatever leaves that in doubt costs a new one.
    """

    _HEADER = b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"

    def __init__(self) -> None:
        self._parser = self._opened()

    def _opened(self) -> StreamParser:
        parser = StreamParser(Limits(stanza_bytes=0))
        parser.feed(self._HEADER)
        return parser

    def parse(self, raw: bytes) -> Element:
        """The one element that `raw` must be. Raises StreamError."""
        parser = self._parser
        found = parser.feed(raw)
        if parser.error is None and parser.idle and len(found) == 1:
            element = found[0]
            if isinstance(element, Element) and len(element.raw) == len(raw):
                return element
        self._parser = self._opened()
        raise parser.error or StreamError("bad-format", "exactly one element is wanted")


_stanzas = StanzaParser()
parse_stanza = _stanzas.parse
