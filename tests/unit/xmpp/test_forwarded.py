"""XEP-0297."""

from __future__ import annotations

import pytest
from lxml import etree

from tidings.xmpp import ns
from tidings.xmpp.forwarded import forwarded


@pytest.mark.parametrize(
    "raw",
    [
        b"<message><body>x</body></message>",
        b"<message/>",
        b"<message\n\tto='a'><body/></message>",
        b"<message xmlns='jabber:client'><body/></message>",
        b"<message to='a>b' xmlns = \"jabber:client\" id='1'><body/></message>",
        b"<message id=\" xmlns='jabber:server'\"><body/></message>",
        b"<message xmlns:p='u'><body/><p:x xmlns='u'/></message>",
        b"<message >a='b' xmlns='u'<body/></message>",
        b"<message to='x' ><body xmlns='jabber:client'/></message>",
    ],
)
def test_a_forwarded_stanza_keeps_its_namespace_and_its_content(raw: bytes) -> None:
    """3"""
    tree = etree.fromstring(forwarded(raw))
    assert tree.tag == f"{{{ns.FORWARD}}}forwarded"
    (stanza,) = tree
    wanted = etree.fromstring(b"<s xmlns='jabber:client'>" + raw + b"</s>")[0]
    assert stanza.tag == "{jabber:client}message"
    assert stanza.attrib == wanted.attrib
    assert [child.tag for child in stanza] == [child.tag for child in wanted]
    assert "".join(stanza.itertext()) == "".join(wanted.itertext())


def test_a_stanza_of_another_namespace_stays_in_it() -> None:
    (stanza,) = etree.fromstring(forwarded(b"<message to='b' xmlns='jabber:server'/>"))
    assert stanza.tag == "{jabber:server}message"


def test_the_time_at_which_it_came_goes_before_the_stanza() -> None:
    """3, XEP-0203 4"""
    delay, _stanza = etree.fromstring(forwarded(b"<message/>", 1278803305000))
    assert (delay.tag, delay.get("stamp")) == (f"{{{ns.DELAY}}}delay", "2010-07-10T23:08:25.000Z")
