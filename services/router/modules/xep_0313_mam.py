"""XEP-0313: Message Archive Management, of accounts: one's own messages, a page at a time (XEP-0059).

What is written into an archive, and its ids (XEP-0359), are the business of the way of a message; this only reads.
Of the optional features `urn:xmpp:mam:2#extended` is not announced: 7 wants it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from lxml import etree

from services.router.messages import ArchiveQuery, Kept, MessageStore, UnknownId, id_bytes, id_text, written
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.kit.module import MESSAGE, Module, ModuleSpec, Session, Stanza, Where
from tidings.xmpp import datetimes, forms, ns, rsm
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.forwarded import forwarded
from tidings.xmpp.jid import Jid, JidError
from tidings.xmpp.stanza import quoteattr

QUERY = f"{{{ns.MAM}}}query"

# 4.1: what a query may be limited by.
FIELDS = (
    forms.Field("with", "jid-single"),
    forms.Field("start", "text-single"),
    forms.Field("end", "text-single"),
)
_NAMES = frozenset(field.var for field in FIELDS)

# Bytes of the messages of one page, if it has more than one: stops a page of big messages from overflowing the
# client's send queue, which would cut it off at the same page for ever.
PAGE_BYTES = 1_048_576
# Messages of one page where the option sets no limit: stops an archive from being read into memory as a whole.
PAGE_MESSAGES = 10_000
# Seconds to wait for what is being written when somebody asks.
WRITTEN_TIMEOUT = 2.0
# Characters of a query's id, which each result repeats: stops a small request from becoming a huge answer.
QUERY_ID_CHARACTERS = 1024


def load(module: Module) -> None:
    archive = _Archive(module)
    # 7 and XEP-0059 4: announced where the archives are.
    for namespace in (ns.MAM, ns.RSM):
        module.feature(namespace, Where.ACCOUNT)
    # XEP-0359 5: the account gives the ids, and the server minds the rules for it.
    module.feature(ns.STANZA_ID, Where.ACCOUNT, Where.SERVER)
    module.on_iq(QUERY, archive.form, types=("get",), where=(Where.ACCOUNT,))
    module.on_iq(QUERY, archive.query, types=("set",), where=(Where.ACCOUNT,))


MODULE = ModuleSpec("mam", load, xep="XEP-0313", version="1.1.3")


class _Archive:
    def __init__(self, module: Module) -> None:
        self._router = module.router
        self._options = module.options
        self._messages = module.router.store(MessageStore)

    def form(self, iq: Stanza) -> bytes:
        """4.1.5: the fields that may be filled in."""
        owner(iq)
        return f"<query xmlns='{ns.MAM}'>{forms.empty_form(ns.MAM, FIELDS)}</query>".encode()

    async def query(self, iq: Stanza) -> bytes:
        session = owner(iq)
        account = session.jid.bare
        query_id = iq.payload.get("queryid")
        if query_id is not None and len(query_id) > QUERY_ID_CHARACTERS:
            raise StanzaError("bad-request", f"a queryid has at most {QUERY_ID_CHARACTERS} characters")
        if iq.payload.get("node") is not None:
            # 6.1.3: for archives of publish-subscribe nodes (XEP-0442).
            raise StanzaError("feature-not-implemented", "an account's archive has no nodes")
        wanted, count_only = _wanted(iq.payload, self._options.for_host(account.domain, "max-archive-page"))
        # Who asks for what comes behind the last one that it got must not be told that there is no such one.
        await written(self._messages, WRITTEN_TIMEOUT)
        try:
            page = await self._messages.page(account, wanted)
        except UnknownId:
            raise _not_found() from None
        if self._router.sessions(session.account).get(session.jid.resource) is not session:
            # What is delivered to it goes nowhere, but the answer might find it where it is now.
            raise StanzaError("recipient-unavailable", "the session has gone to another place meanwhile")
        messages = [] if count_only else _fitting(page.messages, wanted.backwards)
        self._give(session, messages, query_id, iq.envelope.number)
        return _fin(messages, page.complete and len(messages) == len(page.messages))

    def _give(self, session: Session, messages: Sequence[Kept], query_id: str | None, number: int) -> None:
        """4.2: the results, all of them before the answer, which ends them; `number`: of the query, as in that."""
        account, full = session.account, str(session.jid)
        id_ = "" if query_id is None else f" queryid={quoteattr(query_id)}"
        head = f"<message from={quoteattr(account)} to={quoteattr(full)}><result xmlns='{ns.MAM}'{id_} id='".encode()
        for kept in messages:
            content = forwarded(kept.stanza, kept.received_unix_ms)
            raw = b"%b%b'>%b</result></message>" % (head, id_text(kept.id).encode(), content)
            result = Envelope(kind=MESSAGE, from_jid=account, to_jid=full, stanza=raw, answers=number)
            self._router.deliver(session, result)


def owner(iq: Stanza) -> Session:
    """The session that asks for what is its own account's. 8.1: an archive is its owner's alone, and nobody else
    learns whether there is one. Raises StanzaError."""
    session = iq.session
    if session is None or iq.to != session.jid.bare:
        raise StanzaError("forbidden")
    return session


def _wanted(query: etree._Element, most: int) -> tuple[ArchiveQuery, bool]:
    """What a query asks for, `most` messages at most; and whether only for their number. Raises StanzaError."""
    page = rsm.parse(query)
    if page.index is not None:
        # XEP-0059 2.6: to find a place by its number, all messages before it would be counted.
        raise StanzaError("feature-not-implemented", "pages are found by ids here, not by index")
    with_, start, end = _filter(query)
    limit = most or PAGE_MESSAGES
    if page.max is not None:
        limit = min(limit, page.max)
    wanted = ArchiveQuery(
        with_=with_,
        start=start,
        end=end,
        after=_id(page.after),
        before=_id(page.before),
        backwards=page.before is not None,
        # Whether there are any at all can be told, and whether the ids are known (XEP-0059 2.4).
        limit=limit or 1,
    )
    return wanted, not limit


def _filter(query: etree._Element) -> tuple[Jid | None, int | None, int | None]:
    """4.1.1, 4.1.2: with whom, from when, till when. Raises StanzaError."""
    form = forms.submission(query)
    if form is None:
        return None, None, None
    if form.form_type != ns.MAM:
        raise StanzaError("bad-request", f"the FORM_TYPE of a query is {ns.MAM}")
    unknown = form.fields.keys() - _NAMES
    if unknown:
        # 4.1.5
        raise StanzaError("feature-not-implemented", f"no such field: {min(unknown)[:40]}")
    with_, start, end = form.single("with"), form.single("start"), form.single("end")
    try:
        return (
            Jid.parse(with_) if with_ else None,
            # A message is of a millisecond; what the client says may be finer.
            datetimes.to_unix_ms(start, up=True) if start else None,
            datetimes.to_unix_ms(end) if end else None,
        )
    except JidError:
        raise StanzaError("not-acceptable", "the field with is no JID") from None
    except ValueError as error:
        raise StanzaError("not-acceptable", str(error)) from None


def _id(text: str | None) -> bytes | None:
    """The id that a client names; None for none. Raises StanzaError."""
    if not text:
        return None
    id_ = id_bytes(text)
    if id_ is None:
        raise _not_found()
    return id_


def _not_found() -> StanzaError:
    # 4.3.2
    return StanzaError("item-not-found", "no message of this archive has that id")


def _fitting(messages: Sequence[Kept], backwards: bool) -> list[Kept]:
    """The messages of a page, less those too many bytes away from the end where it begins."""
    fitting: list[Kept] = []
    size = 0
    for kept in reversed(messages) if backwards else messages:
        size += len(kept.stanza)
        if fitting and size > PAGE_BYTES:
            break
        fitting.append(kept)
    return fitting[::-1] if backwards else fitting


def _fin(messages: Sequence[Kept], complete: bool) -> bytes:
    """4.3.2: which page it was. Their number is left out, as XEP-0059 2.2 allows: counting is as dear as reading."""
    outer = [id_text(messages[0].id), id_text(messages[-1].id)] if messages else []
    said = " complete='true'" if complete else ""
    return f"<fin xmlns='{ns.MAM}'{said}>{rsm.result(*outer)}</fin>".encode()
