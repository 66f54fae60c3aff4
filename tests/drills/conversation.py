"""What a drill client says and hears in its sessions, and what it counts and writes down of that (XEP-0198 4)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape, quoteattr

from tests.drills.history import (
    Acknowledged,
    Answered,
    Asked,
    Available,
    Bounced,
    Confirmed,
    History,
    Received,
    Saw,
    Sent,
)
from tests.drills.lives import account_of
from tests.drills.stream import Stream
from tidings.xmpp import ns

# An acknowledgement is requested after so many stanzas, and at every tick.
REQUEST_EVERY = 5
# A client with so many unacknowledged stanzas writes no more.
MOST_UNACKNOWLEDGED = 500
# A pause is one when it is longer than this.
PAUSE = 0.3
COUNTER = 2**32

QUERY = "urn:example:drill"

Kind = Literal["message", "iq", "presence"]


class Pending(NamedTuple):
    """A stanza that was written and is not acknowledged."""

    kind: Kind
    key: str
    xml: str
    sent: Sent | None = None


@dataclass(frozen=True)
class Habits:
    """What kind of client it is."""

    managed: bool = True
    # After <resumed/>: sends again all stanzas, or messages only.
    resends: Literal["all", "messages"] = "all"
    # After <failed/>: sends unacknowledged messages again in its new session, which may double them.
    resends_after_failure: bool = True
    priority: int = 0
    # The resumption time that it asks for, in seconds (XEP-0198 3, `max`); 0: the server's.
    resumption: int = 0


class Conversation:
    """The sessions of one device, without the way to get one."""

    def __init__(self, history: History, jid: str, random: Random, habits: Habits) -> None:
        self._history = history
        self.jid = jid
        self.domain = jid.partition("@")[2].partition("/")[0]
        self._random = random
        self.habits = habits
        self.session = ""
        # The session of which it knows that the server has dealt with its presence.
        self._available = ""
        self._stream: Stream | None = None
        self._numbers = 0
        # XEP-0198: whether stanzas are counted, what was counted in, and what the server has acknowledged.
        self.counting = False
        self.handled = 0
        self.acknowledged = 0
        self.unacknowledged: deque[Pending] = deque()
        self._since_request = 0
        # When the oldest request that the server has not answered was made.
        self._requested: float | None = None
        self.unconfirmed: list[str] = []
        # From when, and for how many seconds, it had no service.
        self.pauses: list[tuple[float, float]] = []
        # What a server must not do.
        self.complaints: list[str] = []

    @property
    def works(self) -> bool:
        return self._stream is not None

    @property
    def account(self) -> str:
        return account_of(self.jid)

    def waiting(self) -> int:
        """Messages that it has written and the server has not acknowledged."""
        return sum(pending.kind == "message" for pending in self.unacknowledged)

    def in_flight(self) -> int:
        """The same; with XEP-0198 also those the other way."""
        return self.waiting() + (len(self.unconfirmed) if self.counting else 0)

    # --- out ---

    def _write(self, kind: Kind, key: str, xml: str, sent: Sent | None = None) -> None:
        if self._stream is None:
            return
        # Written down before it is written: the connection may break in its midst.
        self.unacknowledged.append(Pending(kind, key, xml, sent))
        self._stream.write(xml)
        self._since_request += 1
        if self.counting and self._since_request >= REQUEST_EVERY:
            self._request()

    def _request(self) -> None:
        if self._stream is not None and self._requested is None:
            self._requested = self._history.now()
            self._since_request = 0
            self._stream.write(f"<r xmlns='{ns.SM}'/>")

    def send(self, to: str, type_: str = "chat", size: int = 40) -> str:
        """Writes a message; its key, or '' when it can't now."""
        if self._stream is None or len(self.unacknowledged) >= MOST_UNACKNOWLEDGED:
            return ""
        self._numbers += 1
        key = f"{self.jid}-{self._numbers}"
        filler = "".join(self._random.choices("abc <&>'\"é✓", k=size))
        self._send(key, to, type_, f"{key} {filler}.")
        return key

    def _send(self, key: str, to: str, type_: str, body: str) -> None:
        sent = Sent(self._history.now(), self.session, key, to, type_, body)
        self._history.record(sent)
        named = "" if type_ == "normal" else f" type='{type_}'"
        xml = f"<message to={quoteattr(to)} id={quoteattr(key)}{named}><body>{escape(body)}</body></message>"
        self._write("message", key, xml, sent)

    def ask(self, to: str) -> str:
        """Writes a request: a ping to the server, or one that another drill client answers; its key."""
        if self._stream is None or len(self.unacknowledged) >= MOST_UNACKNOWLEDGED:
            return ""
        self._numbers += 1
        key = f"{self.jid}-q{self._numbers}"
        content = f"<ping xmlns='{ns.PING}'/>" if to == self.domain else f"<query xmlns='{QUERY}'/>"
        self._history.record(Asked(self._history.now(), self.session, key, to))
        if not self.counting and self._requested is None and to == self.domain:
            self._requested = self._history.now()
        self._write("iq", key, f"<iq type='get' to={quoteattr(to)} id={quoteattr(key)}>{content}</iq>")
        return key

    def subscribe(self, to: str) -> None:
        """RFC 6121 3.1: drill clients agree to every request."""
        self._write("presence", "", f"<presence type='subscribe' to={quoteattr(to)}/>")

    # --- in ---

    def _take(self, element: Element) -> None:
        match element.tag.partition("}")[2] if element.tag.startswith(f"{{{ns.SM}}}") else element.tag:
            case "r":
                self._confirm()
            case "a":
                self._answered()
                self._acknowledge(int(element.get("h", "0")))
            case tag if tag.startswith(f"{{{ns.CLIENT}}}"):
                if self.counting:
                    self.handled = (self.handled + 1) % COUNTER
                self._stanza(element)

    def _answered(self) -> None:
        """The server has answered the request that was made last."""
        if self._requested is not None:
            waited = self._history.now() - self._requested
            if waited > PAUSE and self.counting:
                self.pauses.append((self._requested, waited))
            self._requested = None

    def _confirm(self) -> None:
        """XEP-0198 4: <a/> with exactly what has come."""
        if self._stream is not None and self._stream.write(f"<a xmlns='{ns.SM}' h='{self.handled}'/>"):
            self._note_confirmed()

    def _note_confirmed(self) -> None:
        if self.unconfirmed:
            self._history.record(Confirmed(self._history.now(), self.session, tuple(self.unconfirmed)))
            self.unconfirmed.clear()

    def _acknowledge(self, h: int) -> None:
        """XEP-0198 4: the server has handled the first h of this session's stanzas, modulo 2^32."""
        count = (h - self.acknowledged) % COUNTER
        if count > len(self.unacknowledged):
            self.complaints.append(f"{self.session}: h={h}, but only {len(self.unacknowledged)} more were sent")
            return
        self.acknowledged = h
        self._note_acknowledged(count)

    def _note_acknowledged(self, count: int) -> None:
        done = [self.unacknowledged.popleft() for _ in range(count)]
        keys = tuple(pending.key for pending in done if pending.kind == "message")
        if keys:
            self._history.record(Acknowledged(self._history.now(), self.session, keys))

    def _stanza(self, element: Element) -> None:
        kind = element.tag.partition("}")[2]
        type_ = element.get("type", "")
        if kind == "message":
            self._message(element, type_)
        elif kind == "iq":
            self._iq(element, type_)
        elif kind == "presence":
            self._presence(element, type_)

    def _message(self, element: Element, type_: str) -> None:
        key = element.get("id", "")
        if type_ == "error":
            self._history.record(Bounced(self._history.now(), self.session, key, _condition(element)))
            self._later_answered(key)
            return
        body = element.findtext(f"{{{ns.CLIENT}}}body", "")
        self._history.record(Received(self._history.now(), self.session, key, element.get("from", ""), body))
        self.unconfirmed.append(key)

    def _later_answered(self, key: str) -> None:
        """Without XEP-0198: what was written before a stanza that is answered counts as acknowledged."""
        if self.counting:
            return
        place = next((n for n, pending in enumerate(self.unacknowledged) if pending.key == key), None)
        if place is not None:
            self._note_acknowledged(place)
            self.unacknowledged.popleft()

    def _iq(self, element: Element, type_: str) -> None:
        key, sender = element.get("id", ""), element.get("from", "")
        if type_ in ("result", "error"):
            if key == "bind":
                return
            self._history.record(Answered(self._history.now(), self.session, key, sender))
            if not self.counting:
                if sender == self.domain:
                    # Somebody else may take long to answer, or be gone.
                    self._answered()
                self._later_answered(key)
            return
        known = len(element) and element[0].tag in (f"{{{ns.PING}}}ping", f"{{{QUERY}}}query")
        # Without `to` the answer goes to our own server or account.
        to = f" to={quoteattr(sender)}" if sender else ""
        error = f"<error type='cancel'><service-unavailable xmlns='{ns.STANZA_ERRORS}'/></error>"
        words = f"{to} id={quoteattr(key)}"
        self._write("iq", "", f"<iq type='result'{words}/>" if known else f"<iq type='error'{words}>{error}</iq>")
        if not self.counting and known and self._stream is not None and sender in ("", self.domain, self.account):
            # The server's own ping, answered: all that came before it has come.
            self._note_confirmed()

    def _presence(self, element: Element, type_: str) -> None:
        sender = element.get("from", "")
        if type_ == "subscribe":
            self._write("presence", "", f"<presence type='subscribed' to={quoteattr(sender)}/>")
        elif not type_ and sender == self.jid and self._available != self.session:
            self._available = self.session
            self._history.record(Available(self._history.now(), self.session))
        elif type_ in ("", "unavailable") and "/" in sender and account_of(sender) != self.account:
            # Of sessions only: for an account that nobody is at, a server may answer itself (RFC 6121 4.3.2).
            self._history.record(Saw(self._history.now(), self.session, sender, not type_))


def _condition(element: Element) -> str:
    error = element.find(f"{{{ns.CLIENT}}}error")
    return "" if error is None or not len(error) else error[0].tag.partition("}")[2]
