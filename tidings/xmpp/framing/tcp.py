"""The framing of RFC 6120: one XML document for each stream, over TCP."""

from __future__ import annotations

from tidings.xmpp import ns
from tidings.xmpp.errors import StreamError
from tidings.xmpp.parser import Limits, Parsed, StreamParser
from tidings.xmpp.stanza import attribute


class TcpFraming:
    """What differs between the transports, for `tidings.xmpp.stream`."""

    def __init__(self, limits: Limits) -> None:
        self.parser = StreamParser(limits)

    def feed(self, data: bytes) -> list[Parsed]:
        return self.parser.feed(data)

    def header(self, *, id_: str, from_: str, to: str, lang: str) -> bytes:
        """Our stream header (RFC 6120 4.7)."""
        return (
            f"<?xml version='1.0'?><stream:stream xmlns='{ns.CLIENT}' xmlns:stream='{ns.STREAMS}' version='1.0'"
            f"{attribute('id', id_)}{attribute('from', from_)}{attribute('to', to)}{attribute('xml:lang', lang)}>"
        ).encode()

    def features(self, children: bytes) -> bytes:
        return b"<stream:features>%b</stream:features>" % children

    def error(self, error: StreamError) -> bytes:
        return error.to_xml()

    def footer(self) -> bytes:
        return b"</stream:stream>"
