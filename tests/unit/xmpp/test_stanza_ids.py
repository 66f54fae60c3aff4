"""XEP-0359: ids are put into messages and forged ones taken out, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from tidings.xmpp import ns, stanza_ids
from tidings.xmpp.parser import parse_stanza
from tidings.xmpp.stanza import to_tree

JULIET = "juliet@example.org"
OTHER = "room@muc.example.org"
ID = f"{{{ns.STANZA_ID}}}stanza-id"

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="￾￿"), max_size=12)


def quoted(text: str, quote: str) -> str:
    return (
        quote
        + text.replace("&", "&amp;").replace("<", "&lt;").replace(quote, "&#x27;" if quote == "'" else "&#34;")
        + quote
    )


@st.composite
def ids_by(draw: st.DrawFn, by: str) -> str:
    """A <stanza-id/> in one of the notations that XML has for it."""
    prefix = draw(st.sampled_from(("", "p:", "outer:")))
    quote = draw(st.sampled_from("'\""))
    spelled = draw(st.sampled_from((by, by.upper(), by.capitalize())))
    if draw(st.booleans()):
        spelled = "".join(f"&#{ord(letter)};" for letter in spelled)
    declared = {"": f" xmlns={quote}{ns.STANZA_ID}{quote}", "p:": f"\n xmlns:p='{ns.STANZA_ID}'", "outer:": ""}[
        prefix
    ]
    attributes = [declared, f" by={quote}{spelled}{quote}", f"\tid = {quoted(draw(texts), quote)}", " other='/>'"]
    head = f"<{prefix}stanza-id{''.join(draw(st.permutations(attributes)))}"
    content = draw(
        st.sampled_from(("", "text", f"<stanza-id xmlns='{ns.STANZA_ID}' by='{by}' id='inner'/>", "<a>/></a>"))
    )
    if not content and draw(st.booleans()):
        return f"{head} />"
    return f"{head}>{content}</{prefix}stanza-id\n>"


others = st.one_of(
    texts.map(lambda text: f"<body>{quoted(text, chr(39))[1:-1]}</body>"),
    ids_by(OTHER),
    # Quoted within another element, without an address, in another namespace: none of these is the archive's id.
    ids_by(JULIET).map(lambda forged: f"<quote xmlns='urn:example'>{forged}</quote>"),
    st.sampled_from(
        (
            f"<stanza-id xmlns='{ns.STANZA_ID}' id='x'/>",
            f"<stanza-id by='{JULIET}' id='x'/>",
            f"<stanza-id xmlns='{ns.STANZA_ID}' by='@' id='x'/>",
            f"<stanza-id xmlns='{ns.STANZA_ID}' by='{JULIET}/balcony' id='x'/>",
            f"<origin-id xmlns='{ns.STANZA_ID}' id='x' by='{JULIET}'/>",
            f"<stanza-id xmlns='{ns.STANZA_ID}' xmlns:q='u' q:by='{JULIET}' id='x'/>",
            "<body><![CDATA[<stanza-id/>]]></body>",
            " \n",
            "é",
        )
    ),
)
children = st.lists(
    st.one_of(others.map(lambda xml: (xml, False)), ids_by(JULIET).map(lambda xml: (xml, True))), max_size=8
)


@given(children, texts)
def test_only_ids_by_the_archive_are_removed_and_all_else_stays_as_it_came(
    pieces: list[tuple[str, bool]], value: str
) -> None:
    """3, rules 2, 3 and 7."""
    head = f"<message xmlns:outer='{ns.STANZA_ID}' a={quoted(value, chr(34))}>"
    raw = "".join((head, *(xml for xml, _ in pieces), "</message >")).encode()
    wanted = "".join((head, *(xml for xml, forged in pieces if not forged), "</message >")).encode()
    assert stanza_ids.remove_forged(raw, (JULIET,)) == wanted
    parse_stanza(wanted)


def test_nothing_is_removed_from_an_empty_message() -> None:
    assert stanza_ids.remove_forged(b"<message/>", (JULIET,)) == b"<message/>"


def test_ids_by_each_of_several_archives_are_removed() -> None:
    raw = b"<message/>"
    for by in (JULIET, OTHER, "romeo@example.org"):
        raw = stanza_ids.add(raw, by, by)
    left = to_tree(stanza_ids.remove_forged(raw, {JULIET, "romeo@example.org"}))
    assert [child.get("by") for child in left] == [OTHER]


@given(texts, texts)
def test_an_id_is_added_whatever_is_in_it(by: str, id_: str) -> None:
    tree = to_tree(stanza_ids.add(b"<message><body/></message>", by, id_))
    assert [child.tag for child in tree] == ["{jabber:client}body", ID]
    assert (tree[-1].get("by"), tree[-1].get("id")) == (by, id_)


def test_an_id_with_line_breaks_and_tabs_is_added_as_it_is() -> None:
    tree = to_tree(stanza_ids.add(b"<message/>", JULIET, "a\n\r\t'\"<&"))
    assert tree[0].get("id") == "a\n\r\t'\"<&"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"<message><body>x</body></message>", b"<message><body>x</body>%b</message>"),
        (b"<message><x/></message\n>", b"<message><x/>%b</message\n>"),
        (b"<message></message>", b"<message>%b</message>"),
        (b"<message/>", b"<message>%b</message>"),
        (b"<message a='/>' />", b"<message a='/>' >%b</message>"),
        (b"<message><body><![CDATA[x]]></body>y</message>", b"<message><body><![CDATA[x]]></body>y%b</message>"),
    ],
)
def test_an_id_becomes_the_last_child(before: bytes, after: bytes) -> None:
    element = b"<stanza-id xmlns='urn:xmpp:sid:0' by=\"juliet@example.org\" id='28482-98726-73623'/>"
    added = stanza_ids.add(before, JULIET, "28482-98726-73623")
    assert added == after % element
    assert parse_stanza(added).children[-1] == stanza_ids.STANZA_ID


@given(children, st.booleans())
def test_what_is_added_is_removed_again(pieces: list[tuple[str, bool]], short: bool) -> None:
    head = f"<message xmlns:outer='{ns.STANZA_ID}'>"
    raw = (
        b"<message to='x'></message>"
        if short
        else "".join((head, *(xml for xml, forged in pieces if not forged), "</message>")).encode()
    )
    added = stanza_ids.add(raw, JULIET, "id")
    assert etree.fromstring(added)[-1].tag == ID
    assert stanza_ids.remove_forged(added, (JULIET,)) == raw
