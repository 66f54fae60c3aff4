"""XEP-0059."""

from __future__ import annotations

import pytest
from lxml import etree

from tidings.xmpp import ns, rsm
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.rsm import PageRequest


def parsed(inner: str) -> PageRequest:
    return rsm.parse(etree.fromstring(f"<query xmlns='u'>{inner}</query>"))


@pytest.mark.parametrize(
    ("inner", "wanted"),
    [
        ("", PageRequest()),
        # 2.1
        ("<max>10</max>", PageRequest(max=10)),
        # 2.2
        (
            "<max> 10\n</max><after>peterpan@neverland.lit</after>",
            PageRequest(max=10, after="peterpan@neverland.lit"),
        ),
        ("<after/>", PageRequest()),
        # 2.3
        ("<before>peter@pixyland.org</before>", PageRequest(before="peter@pixyland.org")),
        # 2.5
        ("<max>10</max><before/>", PageRequest(max=10, before="")),
        # 2.6
        ("<max>10</max><index>371</index>", PageRequest(max=10, index=371)),
        # 2.7
        ("<max>0</max>", PageRequest(max=0)),
        ("<other/>", PageRequest()),
    ],
)
def test_a_request_says_which_page_it_wants(inner: str, wanted: PageRequest) -> None:
    assert parsed(f"<set xmlns='{ns.RSM}'>{inner}</set>") == wanted


def test_a_request_without_a_set_says_nothing() -> None:
    assert parsed("<set xmlns='urn:example'><max>1</max></set>") == PageRequest()


@pytest.mark.parametrize("number", ["", "-1", "1.5", "ten", "0x10", "٣", "1" * 19, "1_0"])
@pytest.mark.parametrize("name", ["max", "index"])
def test_a_number_that_is_none_is_refused(name: str, number: str) -> None:
    with pytest.raises(StanzaError) as refused:
        parsed(f"<set xmlns='{ns.RSM}'><{name}>{number}</{name}></set>")
    assert refused.value.condition == "bad-request"


def test_a_page_is_named_by_its_first_and_its_last_item() -> None:
    """2.2"""
    tree = etree.fromstring(rsm.result("a<", "b&", index=0, count=800))
    assert tree.tag == rsm.SET
    assert [(etree.QName(child).localname, child.text) for child in tree] == [
        ("first", "a<"),
        ("last", "b&"),
        ("count", "800"),
    ]
    assert tree[0].get("index") == "0"


def test_an_empty_page_has_no_first_and_no_last_item() -> None:
    """2.2"""
    assert rsm.result() == f"<set xmlns='{ns.RSM}'></set>"
    assert rsm.result(count=790) == f"<set xmlns='{ns.RSM}'><count>790</count></set>"
