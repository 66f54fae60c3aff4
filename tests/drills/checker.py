"""History in, verdict out: was the promise kept? Pure. Each rule stands beside the sentence of docs/guarantees.md
that it checks, and has in test_checker*.py a history that must fail it and a twin that must pass.

What the history leaves open is not a fault: a session that still waits for its resumption, an answer whose time is
not over. `patient=False` counts it as one: a drill is settled when even that finds nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.drills.history import (
    Acknowledged,
    Answered,
    Asked,
    Bounced,
    Confirmed,
    Dropped,
    Event,
    Fault,
    Received,
    Saw,
    Sent,
)
from tests.drills.lives import Life, Lives, account_of

# Kinds of findings.
LOST = "lost"
DOUBLED = "doubled"
DISORDERED = "out of order"
PHANTOM = "phantom"
UNANSWERED = "unanswered"
ANSWERED_TWICE = "answered twice"
WRONG_PRESENCE = "wrong presence"
ENDED_EARLY = "ended early"
KINDS = (LOST, DOUBLED, DISORDERED, PHANTOM, UNANSWERED, ANSWERED_TWICE, WRONG_PRESENCE, ENDED_EARLY)

# Seconds of a working stream within which a request is answered.
ANSWER_WITHIN = 30.0
# Seconds of a contact's working stream within which it sees that a session is over, when its time is over and all healed.
PRESENCE_WITHIN = 10.0
# Two sessions that begin within these seconds may see each other twice: by broadcast and by probe (RFC 6121 4.2.2, 4.3.2).
# And three times while something breaks: a probe may meet a session at the router that gives it and at the one that takes it,
# and is answered again when a router dies of which nobody knows what it has answered.
AT_ONE_TIME = 10.0
# Seconds in which a router has said of a stanza that it is dealt with.
DEALT_WITH = 1.0
# Faults in which a node, or its router, stands still.
HUNG = frozenset(("hang node", "hang router", "hung between", "owner wakes"))
# Seconds after which a server knows that a client has gone.
KNOWN = 1.0
# Seconds after a router has woken until the sessions are back there that were resumed elsewhere meanwhile.
HOME = 5.0
# Seconds by which a client may notice later than the server that its stream is lost, with XEP-0198 and without.
NOTICED, PLAIN_NOTICED = 5.0, 25.0


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str
    # The key, or the JID, that it is about.
    of: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.of}: {self.why}"


@dataclass(frozen=True)
class Verdict:
    findings: Sequence[Finding]
    messages: int
    # Messages that were confirmed by one session of an account and given to a later one all the same: no fault, but many are.
    repeated: int

    def count(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)


def check(events: Iterable[Event], durable: bool = True, patient: bool = True) -> Verdict:
    """`durable`: False for `--message-durability=none`, which promises only order and no doubles."""
    case = _Case(list(events))
    findings = [*case.doubled(), *case.disordered(), *case.phantoms()]
    if durable:
        findings += [*case.lost(patient), *case.answers(patient), *case.presence(patient), *case.ended_early()]
    return Verdict(findings, len(case.sent), case.repeated())


class _Case:
    """The history, by what the rules ask of it."""

    def __init__(self, events: list[Event]) -> None:
        self.lives = Lives(events)
        self.end = events[-1].at if events else 0.0
        self.sent: dict[str, list[Sent]] = {}
        self.place: dict[tuple[str, str], int] = {}
        self.acknowledged: set[str] = set()
        self.received: list[Received] = []
        self.confirmed: dict[str, list[Confirmed]] = {}
        self.bounced: list[Bounced] = []
        self.asked: dict[str, Asked] = {}
        self.answered: dict[str, list[Answered]] = {}
        self.dropped: set[str] = set()
        self.saw: dict[tuple[str, str], list[Saw]] = {}
        self.faults: list[Fault] = []
        for event in events:
            self._take(event)
        self.came: dict[str, list[Received]] = {}
        for event in self.received:
            self.came.setdefault(event.key, []).append(event)

    def _take(self, event: Event) -> None:
        match event:
            case Sent():
                self.sent.setdefault(event.key, []).append(event)
                self.place[event.session, event.key] = len(self.place)
            case Acknowledged():
                self.acknowledged.update(event.keys)
            case Received():
                self.received.append(event)
            case Confirmed():
                for key in event.keys:
                    self.confirmed.setdefault(key, []).append(event)
            case Bounced():
                self.bounced.append(event)
            case Asked():
                self.asked.setdefault(event.key, event)
            case Answered():
                self.answered.setdefault(event.key, []).append(event)
            case Dropped():
                self.dropped.update(event.keys)
            case Saw():
                self.saw.setdefault((event.session, event.of), []).append(event)
            case Fault():
                self.faults.append(event)

    # --- "is delivered, or stays stored for the account, or comes back to the sender as an error" ---

    def lost(self, patient: bool) -> Iterator[Finding]:
        bounced = {event.key for event in self.bounced}
        for key in sorted(self.acknowledged & set(self.sent)):
            # Delivered: one session of the account has confirmed it.
            if key in self.confirmed or key in bounced:
                continue
            sent = self.sent[key][0]
            holders = [self.lives[event.session] for event in self.came.get(key, ())]
            # What a session had not confirmed is offered again to the next one, and the last one still has its time.
            if any(life.works for life in holders):
                continue
            if patient and any(life.waits for life in self.lives.of(account_of(sent.to))):
                continue
            if not _is_stored(sent) and self._absent(sent):
                continue
            if holders:
                why = f"{holders[-1].name} ended without confirming it, and no later session was offered it"
            else:
                why = "nobody got it"
            yield Finding(LOST, key, f"to {sent.to}, acknowledged; {why}")

    def _absent(self, sent: Sent) -> bool:
        """RFC 6121 8.5: for a type that is not stored, absence is an outcome. Nobody that it was for was there
        all the time from its sending until now, nor with one router; and of those that are bounced the sender has
        gone, too."""
        if sent.type not in ("headline", "groupchat", "error"):
            if self.lives[sent.session].works:
                return False
        elif any(
            fault.at - DEALT_WITH < sent.at < fault.healed and "database" not in fault.what for fault in self.faults
        ):
            return True
        full = "/" in sent.to
        there = self.lives.of_jid(sent.to) if full else self.lives.of(sent.to)
        return not any(
            life.ended is None and (life.began < sent.at if full else life.priority >= 0 and life.available < sent.at)
            for life in there
        )

    # --- "no session gets a message twice" ---

    def doubled(self) -> Iterator[Finding]:
        """Who sends again after a failed resumption sends another stanza: so many may come as sessions have sent it."""
        counts = Counter((event.session, event.key) for event in self.received)
        for (session, key), count in counts.items():
            senders = len({event.session for event in self.sent.get(key, ())})
            if count > max(1, senders):
                yield Finding(DOUBLED, key, f"{session} got it {count} times")

    # --- "order per pair of full JIDs is kept" ---

    def disordered(self) -> Iterator[Finding]:
        """What came to another session first and falls to this one, because that one was cut off or has gone, may come
        behind what this one got meanwhile; what was sent to the account is in order within itself too, before this one
        began (what another one had had, and what nobody had) and since then."""
        last: dict[tuple[str, str, str, bool, bool], tuple[int, str]] = {}
        seen: set[tuple[str, str]] = set()
        for event in self.received:
            sends = self.sent.get(event.key, [])
            if len(sends) != 1 or (event.session, event.key) in seen:
                continue
            seen.add((event.session, event.key))
            sent = sends[0]
            if "/" in sent.to and sent.to != self.lives[event.session].jid:
                continue  # it was for a session that has gone: that pair's order is over
            leavers = self._leavers(event, sent)
            chains = [
                (event.session, sent.session, sent.to if leavers else "", early, fell)
                for early, fell in self._ways(event, sent, leavers)
            ]
            place = self.place[sent.session, sent.key]
            before = [last.get(chain, (-1, "")) for chain in chains]
            follows = max((one for one in before if one[0] < place), default=None)
            if follows is None:
                yield Finding(DISORDERED, event.key, f"{event.session} got it behind {before[0][1]}")
            else:
                last[chains[before.index(follows)]] = (place, event.key)

    def _ways(self, event: Received, sent: Sent, leavers: Sequence[Life]) -> Sequence[tuple[bool, bool]]:
        """How it may have come: by way of a leaver or not, and whether that one had had it."""
        heir = self.lives[event.session]
        if leavers and sent.at < heir.began:
            return [(True, fell) for fell in self._may_have_fallen(event, sent, leavers)]
        if leavers and sent.to == heir.account and self._was_apart(heir, sent.at):
            return [(False, False), (True, False)]
        return [(False, False)]

    def _was_apart(self, life: Life, at: float) -> bool:
        """Whether a session may not have been at its account's router then: that stood still when it was resumed."""
        return any(
            fault.what in HUNG and fault.at <= resumed <= fault.healed and resumed <= at <= fault.healed + HOME
            for fault in self.faults
            for resumed, _ in life.spans[1:]
        )

    def _leavers(self, event: Received, sent: Sent) -> list[Life]:
        """The other sessions of the account that could have had it: that lived beside this one, as far as the server could
        know, and broke before this came. (Who binds its full JID again is known to have ended.) What was for this one's
        full JID fell to another device only when there was no such session."""
        heir = self.lives[event.session]
        return [
            life
            for life in self.lives.of(heir.account)
            if life is not heir
            and life.began <= event.at
            and (life.ended is None or life.ended > heir.began - (KNOWN if life.jid != heir.jid else 0.0))
            and (life.broken_before(event.at) or self._hung(life, event.at))
            and (
                sent.to != heir.jid
                or (life.jid != heir.jid and sent.at < heir.began and self._had(life, event, sent))
            )
        ]

    def _had(self, life: Life, event: Received, sent: Sent) -> bool:
        """Whether a session got it before this came, or may have been given it, and broke before that reached its client."""
        got = any(other.session == life.name and other.at < event.at for other in self.came[event.key])
        return got or _unread(life, sent)

    def _may_have_fallen(self, event: Received, sent: Sent, leavers: Iterable[Life]) -> Sequence[bool]:
        """Of what was sent before this session began: whether another one had had it. What nobody had may have come to this
        one first, though it was sent before. Where only the server knows, it may be either."""
        began = self.lives[event.session].began
        if any(other.at < began for other in self.came[event.key]):
            return (True,)
        return (False, True) if any(_unread(life, sent) for life in leavers) else (False,)

    def _hung(self, life: Life, at: float) -> bool:
        """Whether its node stood still then: its client learnt of its end when that woke, the server before."""
        return any(
            fault.what in HUNG and fault.at <= at and any(fault.at <= when <= fault.healed for when in life.losses)
            for fault in self.faults
        )

    # --- "no message appears from nowhere" ---

    def phantoms(self) -> Iterator[Finding]:
        for event in self.received:
            sends = self.sent.get(event.key)
            if sends is None:
                yield Finding(PHANTOM, event.key, f"{event.session} got what nobody sent")
                continue
            sent = sends[0]
            life = self.lives[event.session]
            if sent.body != event.body:
                yield Finding(PHANTOM, event.key, f"{event.session} got other bytes than were sent")
            elif event.from_ not in {self.lives[one.session].jid for one in sends}:
                yield Finding(PHANTOM, event.key, f"{event.session} got it from {event.from_}, who did not send it")
            elif account_of(sent.to) != life.account:
                yield Finding(PHANTOM, event.key, f"{event.session} got what was sent to {sent.to}")
            elif event.at < sent.at:
                yield Finding(PHANTOM, event.key, f"{event.session} got it before it was sent")
        for bounce in self.bounced:
            if bounce.key not in self.sent:
                yield Finding(PHANTOM, bounce.key, f"{bounce.session} got an error for what nobody sent")
        for key, answers in self.answered.items():
            if key not in self.asked or self.asked[key].session != answers[0].session:
                yield Finding(PHANTOM, key, f"{answers[0].session} got an answer that it did not ask for")

    # --- "an IQ request gets one answer or one error within 30 s, not counting time … without a working stream" ---

    def answers(self, patient: bool) -> Iterator[Finding]:
        for key, asked in self.asked.items():
            answers = self.answered.get(key, [])
            if len(answers) > 1:
                yield Finding(ANSWERED_TWICE, key, f"{asked.session} got {len(answers)} answers from {asked.to}")
            if not answers and key in self.dropped:
                continue  # it was lost on the way, and its sender leaves it at that
            asker = self.lives[asked.session]
            until = answers[0].at if answers else self.end
            waited = asker.served(asked.at, until)
            if waited > ANSWER_WITHIN:
                yield Finding(UNANSWERED, key, f"{asked.session} waited {waited:.1f} s for {asked.to}")
            elif not answers and not patient and asker.ended is None:
                yield Finding(UNANSWERED, key, f"{asked.session} waits for {asked.to}")

    # --- "… no presence stanza at all from a session that re-attaches or resumes in time … unavailable exactly once" ---

    def presence(self, patient: bool) -> Iterator[Finding]:
        for (session, jid), saw in self.saw.items():
            contact = self.lives[session]
            lives = self.lives.of_jid(jid)
            followed = list(zip(lives, [*lives[1:], None], strict=False))
            shown = "".join("A" if event.available else "U" for event in saw)
            allowed = "".join(self._may_see(contact, life, after, patient) for life, after in followed)
            wrong = re.fullmatch(allowed, shown) is None
            if wrong or not self._saw_each_end(contact, saw, followed) or self._saw_in_between(contact, saw, lives):
                why = f"{session} saw {_words(shown)}; its sessions: {self._sessions(jid)}"
                yield Finding(WRONG_PRESENCE, jid, why)

    def _may_see(self, contact: Life, life: Life, after: Life | None, patient: bool) -> str:
        """What a contact may see of one session, as a regular expression: A available, U unavailable. `after`: the
        next session of the same full JID; where it comes soon, nobody need see the end of the first."""
        if contact.ended is not None and contact.ended < life.began:
            return ""
        # Both ask at one time; or the router of either dies before it has said that it has dealt with the first presence.
        together = abs(contact.began - life.began) < AT_ONE_TIME
        twice = together or any(
            one.began <= fault.at < one.shown + DEALT_WITH for fault in self.faults for one in (life, contact)
        )
        broken = together and any(
            fault.at < max(contact.began, life.began) + AT_ONE_TIME and fault.healed > life.began
            for fault in self.faults
        )
        available = "A{0,3}" if broken else "A{0,2}" if twice else "A?"
        over = self._over(life)
        if over is None:
            return available
        due = after is None and self._is_due(contact, over, self.end)
        if not patient and after is None and life.ended is not None:
            due = due or contact.works
        return f"(?:{available}U)?" if due else f"{available}U?"

    def _saw_each_end(self, contact: Life, saw: list[Saw], followed: list[tuple[Life, Life | None]]) -> bool:
        """Where the next session of the same full JID came late, the end of the first was seen before it."""
        for life, after in followed:
            over = self._over(life)
            if after is not None and over is not None and self._is_due(contact, over, after.began):
                before = [event for event in saw if life.began <= event.at < after.began]
                if before and before[-1].available:
                    return False
        return True

    def _saw_in_between(self, contact: Life, saw: list[Saw], lives: list[Life]) -> bool:
        """Presence came when that of a session's begin had come long ago, and the session was not over."""
        for life in lives:
            over = self._over(life)
            calm = self._calm(contact, max(life.began, contact.began))
            late = 0.0 if life.clean else NOTICED if life.resumption else PLAIN_NOTICED
            if any(calm < event.at and (over is None or event.at < over - late) for event in saw):
                return True
        return False

    def _calm(self, contact: Life, since: float) -> float:
        """When a contact has worked for long enough since then, with nothing broken in the meantime."""
        while True:
            missing, until = PRESENCE_WITHIN, math.inf
            for start, end in contact.spans:
                start = max(start, since)
                worked = (math.inf if end is None else end) - start
                if worked >= missing:
                    until = start + missing
                    break
                missing -= max(0.0, worked)
            broken = [fault.healed for fault in self.faults if fault.at < until and fault.healed > since]
            if not broken or until == math.inf:
                return until
            since = max(broken)

    def _over(self, life: Life) -> float | None:
        """When a session's time was over, if it was; only the server knows it exactly."""
        over = life.ended
        if not life.clean and life.resumption and life.cuts and not life.works:
            waited = life.cuts[-1] + life.resumption
            over = waited if over is None else min(waited, over)
        return None if over is None or over > self.end + NOTICED else over

    def _is_due(self, contact: Life, over: float, until: float) -> bool:
        return self._calm(contact, over) < until

    def _sessions(self, jid: str) -> str:
        return ", ".join(
            f"{life.name} {life.began:.1f}-{'' if life.ended is None else format(life.ended, '.1f')}"
            f" cut {', '.join(format(cut, '.1f') for cut in life.cuts) or 'never'}"
            for life in self.lives.of_jid(jid)
        )

    # --- "… the sessions wait for resumption" ---

    def ended_early(self) -> Iterator[Finding]:
        """XEP-0198 5: resumption was refused though the time that <enabled/> named was not over."""
        for life in self.lives:
            if life.refused and life.ended is not None and life.cuts:
                away = life.ended - life.cuts[-1]
                if away < life.resumption - NOTICED:
                    why = f"resumption refused after {away:.1f} s of {life.resumption:.0f} s"
                    yield Finding(ENDED_EARLY, life.name, why)

    # --- no fault, but worth a look ---

    def repeated(self) -> int:
        """Given to a session that began when an earlier one had confirmed it, over a stream that went on working."""
        count = 0
        for event in self.received:
            life = self.lives[event.session]
            for confirmed in self.confirmed.get(event.key, ()):
                first = self.lives[confirmed.session]
                settled = confirmed.at + 2.0
                if first is not life and life.began > settled and first.working(confirmed.at, settled) >= 2.0:
                    count += 1
                    break
        return count


def _unread(life: Life, sent: Sent) -> bool:
    """Whether a session may have been given a message, as it came or from the store, and never have told its client."""
    return life.lost_within(KNOWN, max(sent.at, life.available))


def _is_stored(sent: Sent) -> bool:
    """RFC 6121 8.5: whether a message waits for an absent receiver, instead of being bounced or dropped."""
    return sent.type == "chat" or (sent.type == "normal" and "/" not in sent.to)


def _words(shown: str) -> str:
    return ", ".join({"A": "available", "U": "unavailable"}[letter] for letter in shown) or "nothing"
