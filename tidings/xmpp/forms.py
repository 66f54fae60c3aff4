"""XEP-0004: Data Forms, and XEP-0068: the field that says which form it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.stanza import attribute, escape_text, quoteattr

if TYPE_CHECKING:
    from lxml.etree import _Element as Tree

FORM = f"{{{ns.DATA_FORMS}}}x"
_FIELD = f"{{{ns.DATA_FORMS}}}field"
_VALUE = f"{{{ns.DATA_FORMS}}}value"
FORM_TYPE = "FORM_TYPE"


class Submission(NamedTuple):
    """A form that somebody filled in."""

    # The value of FORM_TYPE, or ''.
    form_type: str
    # The values of each other field, by its `var`.
    fields: Mapping[str, tuple[str, ...]]

    def single(self, name: str) -> str:
        """The value of a field that has one; '' where it is not filled in, or not there (3.6). Raises StanzaError."""
        values = self.fields.get(name, ())
        if len(values) > 1:
            raise StanzaError("not-acceptable", f"the field {name} has one value")
        return values[0] if values else ""


class Field(NamedTuple):
    """A field of a form to be filled in."""

    var: str
    # 3.3: "jid-single", "text-single", ...
    type: str
    values: tuple[str, ...] = ()
    label: str = ""


def submission(wrapper: Tree) -> Submission | None:
    """The form that a request's payload submits; None where there is none. Raises StanzaError."""
    found = wrapper.findall(FORM)
    if not found:
        return None
    if len(found) > 1 or found[0].get("type") != "submit":
        raise StanzaError("bad-request", "one form, of type submit, is wanted")
    fields: dict[str, tuple[str, ...]] = {}
    for field in found[0].iterfind(_FIELD):
        name = field.get("var", "")
        # 3.2: only what is of type `fixed`, and says nothing, may be without a name.
        if not name and field.get("type") == "fixed":
            continue
        if not name or name in fields:
            raise StanzaError("bad-request", "every field has a name of its own")
        fields[name] = tuple(value.text or "" for value in field.iterfind(_VALUE))
    form_type = fields.pop(FORM_TYPE, ())
    return Submission(form_type[0].strip() if form_type else "", fields)


def empty_form(form_type: str, fields: Iterable[Field]) -> str:
    """A form to be filled in."""
    head = f"<field type='hidden' var='{FORM_TYPE}'><value>{escape_text(form_type)}</value></field>"
    return f"<x xmlns='{ns.DATA_FORMS}' type='form'>{head}{''.join(map(_field, fields))}</x>"


def _field(field: Field) -> str:
    values = "".join(f"<value>{escape_text(value)}</value>" for value in field.values)
    head = f"<field type={quoteattr(field.type)} var={quoteattr(field.var)}{attribute('label', field.label)}"
    return f"{head}>{values}</field>" if values else f"{head}/>"
