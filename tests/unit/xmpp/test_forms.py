"""XEP-0004."""

from __future__ import annotations

import pytest
from lxml import etree

from tidings.xmpp import forms, ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.forms import Field, Submission


def submitted(*fields: str, type_: str = "submit") -> Submission | None:
    form = f"<x xmlns='{ns.DATA_FORMS}' type='{type_}'>{''.join(fields)}</x>"
    return forms.submission(etree.fromstring(f"<query xmlns='u'>{form}</query>"))


HIDDEN = "<field var='FORM_TYPE' type='hidden'><value>urn:example</value></field>"


def test_a_submission_has_the_values_of_its_fields() -> None:
    """3.2; XEP-0068 3: FORM_TYPE says which form it is."""
    form = submitted(
        HIDDEN,
        "<field var='one'><value>1</value></field>",
        "<field var='more' type='text-multi'><value>a</value><value>b</value></field>",
        "<field type='fixed'><value>a heading</value></field>",
    )
    assert form == Submission("urn:example", {"one": ("1",), "more": ("a", "b")})
    assert form is not None
    assert form.single("one") == "1"


def test_a_field_that_is_not_filled_in_has_no_value() -> None:
    """3.6: there is more than one way to say so."""
    form = submitted("<field var='a'/>", "<field var='b'><value/></field>")
    assert form is not None
    assert [form.single(name) for name in ("a", "b", "absent")] == ["", "", ""]


def test_a_payload_without_a_form_submits_none() -> None:
    assert forms.submission(etree.fromstring("<query xmlns='u'><x/></query>")) is None


@pytest.mark.parametrize(
    "fields",
    [
        ("<field><value>x</value></field>",),
        ("<field var='a'/>", "<field var='a'/>"),
        (HIDDEN, HIDDEN),
    ],
)
def test_fields_without_a_name_of_their_own_are_refused(fields: tuple[str, ...]) -> None:
    with pytest.raises(StanzaError) as refused:
        submitted(*fields)
    assert refused.value.condition == "bad-request"


@pytest.mark.parametrize("type_", ["", "form", "result", "cancel"])
def test_a_form_that_is_not_submitted_is_refused(type_: str) -> None:
    """3.1"""
    with pytest.raises(StanzaError) as refused:
        submitted(HIDDEN, type_=type_)
    assert refused.value.condition == "bad-request"


def test_two_forms_are_refused() -> None:
    form = f"<x xmlns='{ns.DATA_FORMS}' type='submit'/>"
    with pytest.raises(StanzaError) as refused:
        forms.submission(etree.fromstring(f"<query xmlns='u'>{form}{form}</query>"))
    assert refused.value.condition == "bad-request"


def test_several_values_where_one_is_wanted_are_not_acceptable() -> None:
    """4"""
    form = submitted("<field var='a'><value>1</value><value>2</value></field>")
    assert form is not None
    with pytest.raises(StanzaError) as refused:
        form.single("a")
    assert refused.value.condition == "not-acceptable"


def test_a_form_to_be_filled_in_names_its_fields() -> None:
    tree = etree.fromstring(
        forms.empty_form("urn:<x>", (Field("with", "jid-single"), Field("a&b", "list-single", ("<",), "A")))
    )
    assert (tree.tag, tree.get("type")) == (forms.FORM, "form")
    assert [
        (field.get("var"), field.get("type"), field.get("label"), [value.text for value in field]) for field in tree
    ] == [
        ("FORM_TYPE", "hidden", None, ["urn:<x>"]),
        ("with", "jid-single", None, []),
        ("a&b", "list-single", "A", ["<"]),
    ]
