"""The parser: RFC 6120 4, 11."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidings.xmpp.errors import StreamError
from tidings.xmpp.parser import (
    MAX_NAMES,
    MAX_TAG_BYTES,
    Limits,
    Parsed,
    StreamFooter,
    StreamHeader,
    StreamParser,
    parse_stanza,
)
from tidings.xmpp.stanza import Element, Stamp, to_bytes, to_tree

HEADER = b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' to='x'>"

STANZAS = [
    b"<presence/>",
    b"<iq id='1' type=\"get\"><q xmlns='a>b'/></iq>",
    b"<message to='a'><body>x/></body></message>",
    b"<presence></presence>",
    b"<message a='/>'>t/></message>",
    b"<presence x='/'></presence >",
    b"<p:a xmlns:p='u'><p:b/></p:a>",
    "<message><body>\u00e9\U0001f600</body></message>".encode(),
    b"<message><body><![CDATA[</message>]]></body></message>",
    b"<message\n to = 'a'\t><body>\r\n</body><x xmlns='urn:x'/><y xmlns='urn:x'/></message\n>",
]
DOCUMENT = HEADER + b" \n ".join(STANZAS) + b"  " + b"".join(STANZAS) + b"</stream:stream>"


def fed(parser: StreamParser, pieces: list[bytes]) -> list[Parsed]:
    events: list[Parsed] = []
    for piece in pieces:
        events += parser.feed(piece)
        while parser.waiting and parser.error is None:
            events += parser.feed(b"")
    return events


WHOLE = fed(StreamParser(Limits()), [DOCUMENT])


def test_elements_are_sliced_out_as_they_came() -> None:
    assert isinstance(WHOLE[0], StreamHeader)
    assert [event.raw for event in WHOLE[1:-1] if isinstance(event, Element)] == STANZAS * 2
    assert isinstance(WHOLE[-1], StreamFooter)


def test_an_element_knows_its_name_attributes_and_children() -> None:
    element = WHOLE[10]
    assert isinstance(element, Element)
    assert (element.name, element.attrs, element.children) == (
        "message",
        {"to": "a"},
        ("body", "{urn:x}x", "{urn:x}y"),
    )


@given(st.lists(st.integers(0, len(DOCUMENT)), max_size=12), st.booleans())
@settings(deadline=None)
def test_bytes_cut_anywhere_give_the_same_events(cuts: list[int], halting: bool) -> None:
    places = [0, *sorted(cuts), len(DOCUMENT)]
    parser = StreamParser(Limits())
    parser.halting = halting
    assert fed(parser, [DOCUMENT[a:b] for a, b in pairwise(places)]) == WHOLE


@pytest.mark.parametrize("halting", [False, True])
def test_bytes_one_by_one_give_the_same_events(halting: bool) -> None:
    parser = StreamParser(Limits())
    parser.halting = halting
    assert fed(parser, [DOCUMENT[n : n + 1] for n in range(len(DOCUMENT))]) == WHOLE


def test_what_was_in_order_before_the_error_is_not_lost() -> None:
    parser = StreamParser(Limits())
    events = parser.feed(HEADER + b"<presence/><message/><!-- x -->")
    assert [type(event) for event in events] == [StreamHeader, Element, Element]
    assert parser.error is not None
    assert parser.error.condition == "restricted-xml"
    assert parser.feed(b"<presence/>") == []


def test_a_new_stream_begins_behind_the_element_that_asked_for_it() -> None:
    parser = StreamParser(Limits())
    parser.halting = True
    parser.feed(HEADER)
    assert len(parser.feed(b"<a xmlns='u'/>" + HEADER + b"<presence/>")) == 1
    parser.restart()
    (header,) = parser.feed(b"")
    assert isinstance(header, StreamHeader)
    assert parser.waiting, "the answer to the header may be that another one reads what follows"
    assert parser.feed(b"") == [Element("presence", {}, (), b"<presence/>")]


@pytest.mark.parametrize("step", [1, 1000])
def test_white_space_before_a_header_is_no_error(step: int) -> None:
    """go-sendxmpp ends <auth/> with a line break; it arrives when the next stream is due."""
    parser = StreamParser(Limits())
    parser.halting = True
    parser.feed(HEADER)
    assert len(parser.feed(b"<a xmlns='u'/>\n")) == 1
    parser.restart()
    rest = b"\r\n " + HEADER + b"<presence/>"
    events = fed(parser, [rest[n : n + step] for n in range(0, len(rest), step)])
    assert parser.error is None
    assert [type(event) for event in events] == [StreamHeader, Element]


def test_prefixes_of_the_header_are_declared_in_stanzas_that_use_them() -> None:
    parser = StreamParser(Limits())
    header = HEADER.replace(b" to='x'", b" xmlns:e='urn:e' xmlns:unused='urn:u'")
    stanza = b"<message to='a'><e:x e:y='1'/></message>"
    element = parser.feed(header + stanza)[1]
    assert isinstance(element, Element)
    assert parse_stanza(element.raw).children == ("{urn:e}x",)
    assert b"unused" not in element.raw
    assert to_tree(element.raw)[0].tag == "{urn:e}x"


def test_a_prefix_that_the_stanza_declares_itself_is_left_alone() -> None:
    parser = StreamParser(Limits())
    header = HEADER.replace(b" to='x'", b" xmlns:e='urn:e'")
    stanza = b"<message xmlns:e='urn:other'><e:x/></message>"
    element = parser.feed(header + stanza)[1]
    assert isinstance(element, Element)
    assert element.raw == stanza


def test_ever_new_names_renew_the_parser_also_within_a_stanza() -> None:
    parser = StreamParser(Limits())
    parser.feed(HEADER)
    for start in range(0, 5 * MAX_NAMES, 500):
        names = b"".join(b"<n%d/>" % n for n in range(start, start + 500))
        # Cut within the stanza: an attacker would never end at a boundary.
        assert parser.feed(b"<iq>" + names) == []
        events = parser.feed(names + b"</iq><presence/>")
        assert [event.name for event in events if isinstance(event, Element)] == ["iq", "presence"]
        assert len(parser._expat.intern) <= MAX_NAMES + 1100
    assert parser.error is None


def test_an_unfinished_tag_is_bounded() -> None:
    parser = StreamParser(Limits(stanza_bytes=1 << 30))
    parser.feed(HEADER)
    fed_bytes = 0
    while parser.error is None:
        parser.feed(b"<message a='" if not fed_bytes else b"x" * 1000)
        fed_bytes += 1000
    assert fed_bytes <= MAX_TAG_BYTES + 3000
    assert parser.error.condition == "policy-violation"


def test_a_long_text_in_crumbs_is_no_long_tag() -> None:
    parser = StreamParser(Limits())
    parser.feed(HEADER + b"<message><body>")
    for _ in range(200):
        assert parser.feed(b"x" * 500) == []
    assert parser.error is None
    assert len(parser.feed(b"</body></message>")) == 1


def test_limits_of_zero_are_off() -> None:
    parser = StreamParser(Limits(0, 0, 0))
    parser.feed(HEADER)
    deep = b"<message>" + b"<a>" * 500 + b"x" * 500_000 + b"</a>" * 500 + b"</message>"
    attributes = b"<iq " + b" ".join(b"a%d='1'" % n for n in range(500)) + b"/>"
    assert len(parser.feed(deep + attributes)) == 2
    assert parser.error is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"  ",
        b"<a/>x",
        b"<iq/><iq/>",
        b"<iq>",
        b"</stream:stream>",
        b"<iq/></stream:stream>",
        b"<iq/",
        b"<!-- -->",
    ],
)
def test_what_is_not_exactly_one_stanza_is_refused(raw: bytes) -> None:
    with pytest.raises(StreamError):
        parse_stanza(raw)
    assert parse_stanza(b"<iq/>").name == "iq", "the next one is not harmed"


def test_stamp_puts_in_what_is_missing_and_replaces_what_is_wrong() -> None:
    stamp = Stamp("romeo@example.com/o'r", "en")
    for raw in (
        b"<message to='a'><body from='x'/></message>",
        b"<message  to='a' from='romeo@example.com'><body/></message>",
        b"<message from = \"x>y\" to='a'/>",
        b"<message xml:lang='it'/>",
        b"<message/>",
    ):
        stamped = parse_stanza(stamp.apply(parse_stanza(raw)))
        assert stamped.attrs["from"] == "romeo@example.com/o'r"
        expected = "it" if b"lang" in raw else "en"
        assert to_tree(stamped.raw).get("{http://www.w3.org/XML/1998/namespace}lang") == expected


def test_trees_and_bytes_go_back_and_forth() -> None:
    raw = b"<message to='a'><body>x</body><y xmlns='urn:y'/></message>"
    tree = to_tree(raw)
    assert tree.tag == "{jabber:client}message"
    again = parse_stanza(to_bytes(tree))
    assert (again.name, again.children) == ("message", ("body", "{urn:y}y"))
    assert b'xmlns="jabber:client"' not in again.raw
