"""RFC 7622."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.xmpp import jid as module
from tidings.xmpp.jid import Jid, JidError

# RFC 7622 3.5, table 1, with the prepared form.
GOOD = [
    ("juliet@example.com", "juliet@example.com"),
    ("juliet@example.com/foo", "juliet@example.com/foo"),
    ("juliet@example.com/foo bar", "juliet@example.com/foo bar"),
    ("juliet@example.com/foo@bar", "juliet@example.com/foo@bar"),
    ("foo\\20bar@example.com", "foo\\20bar@example.com"),
    ("fussball@example.com", "fussball@example.com"),
    ("fu\u00dfball@example.com", "fu\u00dfball@example.com"),
    ("\u03c0@example.com", "\u03c0@example.com"),
    ("\u03a3@example.com/foo", "\u03c3@example.com/foo"),
    ("\u03c3@example.com/foo", "\u03c3@example.com/foo"),
    ("\u03c2@example.com/foo", "\u03c2@example.com/foo"),
    ("king@example.com/\u265a", "king@example.com/\u265a"),
    ("example.com", "example.com"),
    ("example.com/foobar", "example.com/foobar"),
    ("a.example.com/b@example.net", "a.example.com/b@example.net"),
    ("Juliet@EXAMPLE.com.", "juliet@example.com"),
    ("x@xn--fsqu00a.xn--0zwm56d", "x@\u4f8b\u5b50.\u6d4b\u8bd5"),
    ("x@[::1]", "x@[::1]"),
    ("x@127.0.0.1/r", "x@127.0.0.1/r"),
]

# RFC 7622 3.5, table 2, and some more.
BAD = [
    '"juliet"@example.com',
    "foo bar@example.com",
    "juliet@example.com/",
    "@example.com/foo",
    "henry\u2163@example.com",
    "\u265a@example.com",
    "juliet@",
    "/foobar",
    "",
    "a@b@c",
    "a@-b.c",
    "a@b..c",
    "a\x00@b",
    "a@b/\x00",
    "x" * 1024 + "@b",
    "a@b/" + "x" * 1024,
    "\u00e9" * 600 + "@b",
]


@pytest.mark.parametrize(("text", "prepared"), GOOD)
def test_good_address_is_prepared(text: str, prepared: str) -> None:
    assert str(Jid.parse(text)) == prepared


@pytest.mark.parametrize("text", BAD)
def test_bad_address_is_refused(text: str) -> None:
    with pytest.raises(JidError):
        Jid.parse(text)


def test_parts_of_1023_bytes_are_allowed() -> None:
    text = f"{'l' * 1023}@example.com/{'r' * 1023}"
    assert str(Jid.parse(text)) == text


def test_equal_addresses_are_equal_and_hash_alike() -> None:
    assert Jid.parse("Romeo@Example.com/A") == Jid.parse("romeo@example.com/A")
    assert hash(Jid.parse("Romeo@Example.com")) == hash(Jid.parse("romeo@example.com"))
    assert Jid.parse("romeo@example.com/a") != Jid.parse("romeo@example.com/A")


def test_bare_and_full() -> None:
    full = Jid.parse("romeo@example.com/orchard")
    assert str(full.bare) == "romeo@example.com"
    assert full.bare.bare is full.bare
    assert full.bare.with_resource("street") == Jid.parse("romeo@example.com/street")


ascii_text = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=30)


def _or_error(prepare, text):  # type: ignore[no-untyped-def]
    try:
        return prepare(text)
    except JidError:
        return JidError


@given(ascii_text)
def test_quick_way_for_plain_localparts_gives_what_the_profile_gives(text: str) -> None:
    slow = _or_error(lambda value: module._enforce(module._username, value), text)
    if slow is not JidError and not module._EXCLUDED.isdisjoint(slow):
        slow = JidError
    assert _or_error(module.prepare_local, text) == slow


@given(ascii_text)
def test_quick_way_for_plain_resources_gives_what_the_profile_gives(text: str) -> None:
    assert _or_error(module.prepare_resource, text) == _or_error(
        lambda value: module._enforce(module._opaque, value), text
    )


@given(st.text(max_size=60))
def test_whatever_is_parsed_parses_again_to_itself(text: str) -> None:
    parsed = _or_error(Jid.parse, text)
    if parsed is not JidError:
        assert Jid.parse(str(parsed)) == parsed
