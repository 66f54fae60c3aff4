"""A raw client for drills: it writes down every send, acknowledgement and receipt, and hides nothing.

With XEP-0198 it keeps its own counters, resumes at any address, and sends again what was not acknowledged; without, it
answers the server's pings and takes the answer to a later request as acknowledgement.
"""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from collections.abc import Sequence
from random import Random
from xml.etree.ElementTree import Element
from xml.sax.saxutils import quoteattr

from tests.drills.conversation import Conversation, Habits
from tests.drills.history import Began, Cut, Dropped, Ended, History, Managed, Resumed
from tests.drills.stream import Lost, Stream
from tidings.testing.client import header
from tidings.xmpp import ns

# Seconds for one try to get in, and between two.
TRY_FOR = 5.0
RETRY = 0.2
# Seconds between two looks at the stream; and how long it may be silent, with XEP-0198 and without.
TICK = 0.25
SILENCE = 4.0
PLAIN_SILENCE = 20.0
ALL = Habits()


class Client(Conversation):
    """One device of an account: one session after the other."""

    def __init__(
        self, history: History, name: str, resource: str, addresses: Sequence[str], port: int,
        random: Random, habits: Habits = ALL, domain: str = "localhost",
    ) -> None:  # fmt: skip
        super().__init__(history, f"{name}@{domain}/{resource}", random, habits)
        self.name = name
        self._resource = resource
        self._addresses = list(addresses)
        # The address where it was last; a client comes to its first one first.
        self.at = 0
        self._port = port
        self._sessions = 0
        self._task: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._wanted = asyncio.Event()
        self._wanted.set()
        # Connections that it left without a word.
        self._deserted: list[Stream] = []
        # XEP-0198 5: the id to resume by, and where the server would like that.
        self._resume_id = ""
        self._location = ""
        self._lost_at: float | None = None

    # --- life ---

    def start(self) -> None:
        """Comes in, and comes back whenever its stream is lost."""
        self._task = asyncio.create_task(self._live(), name=self.jid)

    async def ready(self, timeout: float = 30.0) -> None:
        """Waits until it has a stream. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not self.works:
                if self._task is not None and self._task.done():
                    self._task.result()
                await asyncio.sleep(0.01)

    async def _live(self) -> None:
        while True:
            await self._wanted.wait()
            if self._stream is None:
                try:
                    async with asyncio.timeout(TRY_FOR):
                        await self._enter()
                except (Lost, OSError, TimeoutError):
                    self.at += 1
                    await asyncio.sleep(min(RETRY, RETRY * (0.5 + self._random.random())))
                    continue
                if not self._wanted.is_set():
                    self.drop()
            try:
                async with asyncio.timeout(TICK):
                    await self._gone.wait()
            except TimeoutError:
                self._look()

    def _look(self) -> None:
        """Requests an acknowledgement where one is missing, and gives a silent stream up."""
        now = self._history.now()
        limit = SILENCE if self.counting else PLAIN_SILENCE
        if self._requested is not None:
            if now - self._requested > limit:
                self.drop()
        elif self.counting:
            self._request()
        else:
            self.ask(self.domain)

    def drop(self) -> None:
        """Loses its connection now."""
        if self._stream is not None:
            self._stream.abort()

    def vanish(self, silently: bool = False) -> None:
        """The same, and stays away until it is called back; silently: the server is not told by a packet."""
        self._wanted.clear()
        if self._stream is not None and silently:
            self._deserted.append(self._stream)
            self._stream.desert()
        self.drop()

    def call_back(self) -> None:
        if not self._wanted.is_set() and self._lost_at is not None:
            self._lost_at = self._history.now()  # till now it was away of its own will
        self._wanted.set()

    def cut_after(self, received: int | None = None, sent: int | None = None) -> None:
        """Loses its connection when so many more bytes have come, or gone."""
        if self._stream is not None:
            self._stream.cut_after(received, sent)

    def read(self, on: bool) -> None:
        if self._stream is not None:
            self._stream.read(on)

    async def stop(self) -> None:
        """Ends as a device that is switched off."""
        for stream in self._deserted:
            stream.abort()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.drop()

    async def close(self, timeout: float = 5.0) -> None:
        """Closes its stream properly (RFC 6120 4.4), with a last <a/> before (XEP-0198 4)."""
        self._wanted.clear()
        stream = self._stream
        if stream is not None:
            if self.counting:
                self._confirm()
            if stream.write("</stream:stream>"):
                try:
                    async with asyncio.timeout(timeout):
                        while not stream.lost:
                            await asyncio.sleep(0.01)
                except TimeoutError:
                    pass
            if self.session:
                self._end(clean=stream.footer)
        await self.stop()

    # --- getting in ---

    async def _enter(self) -> None:
        """Raises Lost, OSError, TimeoutError."""
        host, port = self._address()
        stream = Stream()
        try:
            await stream.connect(host, port, TRY_FOR)
            await self._authenticate(stream)
            if not (self._resume_id and await self._resume(stream)):
                await self._bind(stream)
        except BaseException:
            stream.leave()
            stream.abort()
            raise
        now = self._history.now()
        if self._lost_at is not None:
            self.pauses.append((self._lost_at, now - self._lost_at))
            self._lost_at = None

    def _address(self) -> tuple[str, int]:
        if self._location and self._random.random() < 0.3:
            host, _, port = self._location.rpartition(":")
            self._location = ""
            if port.isdigit():
                return host.strip("[]"), int(port)
        return self._addresses[self.at % len(self._addresses)], self._port

    async def _open(self, stream: Stream) -> Element:
        stream.restart()
        stream.write(header(self.domain))
        return await stream.element()

    async def _authenticate(self, stream: Stream) -> None:
        await self._open(stream)
        data = base64.b64encode(f"\0{self.name}\0secret".encode()).decode()
        stream.write(f"<auth xmlns='{ns.SASL}' mechanism='PLAIN'>{data}</auth>")
        answer = await stream.element()
        if answer.tag != f"{{{ns.SASL}}}success":
            raise Lost("authentication failed")
        await self._open(stream)

    async def _resume(self, stream: Stream) -> bool:
        """XEP-0198 5. False when the server refuses; then a resource can be bound in this stream."""
        # It says what has come as an <a/> does, whether the answer to it comes or not.
        if stream.write(f"<resume xmlns='{ns.SM}' h='{self.handled}' previd={quoteattr(self._resume_id)}/>"):
            self._note_confirmed()
        answer = await stream.element()
        if answer.tag == f"{{{ns.SM}}}failed":
            if (h := answer.get("h")) is not None:
                self._acknowledge(int(h))
            self._end(clean=False, refused=True)
            return False
        if answer.tag != f"{{{ns.SM}}}resumed":
            raise Lost(f"{answer.tag} is no answer to <resume/>")
        self._history.record(Resumed(self._history.now(), self.session))
        self._acknowledge(int(answer.get("h", "0")))
        waiting, self.unacknowledged = self.unacknowledged, deque()
        if self.habits.resends == "messages":
            dropped = tuple(pending.key for pending in waiting if pending.kind != "message" and pending.key)
            if dropped:
                self._history.record(Dropped(self._history.now(), self.session, dropped))
            waiting = deque(pending for pending in waiting if pending.kind == "message")
        self._stream = stream
        # As it would be on an <a/>, and then all that is left, behind one another (XEP-0198 5).
        self.unacknowledged = waiting
        stream.write("".join(pending.xml for pending in waiting))
        self._go_live(stream)
        self._request()
        return True

    async def _bind(self, stream: Stream) -> None:
        stream.write(
            f"<iq type='set' id='bind'><bind xmlns='{ns.BIND}'><resource>{self._resource}</resource></bind></iq>"
        )
        answer = await stream.element()
        if answer.findtext(f".//{{{ns.BIND}}}jid") != self.jid:
            raise Lost("not bound as wished")
        self._sessions += 1
        left, self.unacknowledged = self.unacknowledged, deque()
        self.session = f"{self.jid}#{self._sessions}"
        self.counting, self.handled, self.acknowledged, self._requested = False, 0, 0, None
        self.unconfirmed.clear()
        self._history.record(Began(self._history.now(), self.session, self.jid, self.habits.priority))
        try:
            if self.habits.managed:
                await self._enable(stream)
        except BaseException:
            self._end(clean=False)
            self.unacknowledged = left
            raise
        self._stream = stream
        self._go_live(stream)
        self._write("presence", "", f"<presence><priority>{self.habits.priority}</priority></presence>")
        if self.habits.resends_after_failure:
            for pending in left:
                if pending.sent is not None:
                    self._send(pending.sent.key, pending.sent.to, pending.sent.type, pending.sent.body)

    async def _enable(self, stream: Stream) -> None:
        """XEP-0198 3. Stanzas that come before <enabled/> are not counted."""
        wanted = f" max='{self.habits.resumption}'" if self.habits.resumption else ""
        stream.write(f"<enable xmlns='{ns.SM}' resume='true'{wanted}/>")
        while (answer := await stream.element()).tag.startswith(f"{{{ns.CLIENT}}}"):
            self._stanza(answer)
        if answer.tag != f"{{{ns.SM}}}enabled":
            raise Lost(f"{answer.tag} is no answer to <enable/>")
        self.counting = True
        if answer.get("resume") in ("true", "1"):
            self._resume_id = answer.get("id", "")
            self._location = answer.get("location", "")
        resumption = float(answer.get("max", "300")) if self._resume_id else 0.0
        self._history.record(Managed(self._history.now(), self.session, resumption))

    def _go_live(self, stream: Stream) -> None:
        self._gone.clear()
        self._requested = None
        self._since_request = 0
        stream.go_live(self._take, self._lose)

    def _lose(self) -> None:
        """The stream is gone."""
        stream, self._stream = self._stream, None
        self._gone.set()
        if stream is None or not self.session:
            return
        if stream.error.startswith("not well-formed"):
            self.complaints.append(f"{self.session}: {stream.error}")
        self._lost_at = self._history.now()
        self._requested = None
        if stream.footer and not self._wanted.is_set():
            return  # we have closed it
        self.at = self._random.randrange(len(self._addresses))
        if self._resume_id:
            self._history.record(Cut(self._lost_at, self.session))
        else:
            self._end(clean=False)

    def _end(self, clean: bool, refused: bool = False) -> None:
        self._history.record(Ended(self._history.now(), self.session, clean, refused))
        self.session = ""
        self._resume_id = ""
