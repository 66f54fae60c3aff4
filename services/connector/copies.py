"""Copies of sessions that have no stream at this connector: a session waits for its client, or it has its stream at
another connector and this one was chosen to hold its copy."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.connector.session_copy import Sent, SessionCopy
from tidings.api.common.v1.stanza_pb2 import Envelope
from tidings.api.router.v1.router_pb2 import SessionProgress, StreamCommand
from tidings.kit.link import Overflow
from tidings.kit.logging import get_logger
from tidings.kit.module import NONZA

if TYPE_CHECKING:
    from services.connector.router_link import RouterLink
    from services.connector.streams import Streams

log = get_logger("connector")

# Seconds that a connector without the stream of a session waits for the one that has it.
STREAMS_FIRST = 1.0


class Copies:
    """All of them, by session."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._copies: dict[str, SessionCopy] = {}
        # Those that were brought to another router, and what has been heard of: how often it was sent on.
        self._brought: dict[str, tuple[RouterLink, int]] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def keep(self, session: str, copy: SessionCopy) -> None:
        self._copies[session] = copy

    def forget(self, session: str) -> None:
        self._copies.pop(session, None)
        self._brought.pop(session, None)

    # --- from the router that has the session ---

    def delivered(self, link: RouterLink, envelope: Envelope) -> None:
        copy = self._of(link, envelope.target)
        if copy is None:
            return
        if not envelope.delivery:
            copy.sent(
                Sent(
                    envelope.kind, envelope.type, envelope.id, envelope.to_jid, tuple(envelope.children),
                    envelope.stanza, envelope.answered,
                )
            )  # fmt: skip
        elif envelope.kind != NONZA:
            copy.delivered(envelope, envelope.stanza)

    def progress(self, link: RouterLink, progress: SessionProgress) -> None:
        copy = self._of(link, progress.session)
        if copy is not None:
            copy.progress(progress)

    def _of(self, link: RouterLink, session: str) -> SessionCopy | None:
        """The copy of a session that a router has. One that was brought to another router is that one's: it goes on
        from what it was brought, and gives the same numbers to something else."""
        copy = self._copies.get(session)
        is_its = copy is not None and copy.router == link.node.incarnation and session not in self._brought
        return copy if is_its else None

    def command(self, link: RouterLink, command: StreamCommand) -> None:
        """Does what a router says of a session without a stream."""
        session, which = command.session, command.WhichOneof("command")
        if which == "surrender":
            self._surrender(link, session, command.surrender.router_incarnation)
            return
        copy = self._copies.get(session)
        if which == "attached" and command.attached.HasField("record"):
            self._copies[session] = SessionCopy.of(link.node.incarnation, command.attached)
            self._brought.pop(session, None)  # what is answered to the one before is not for this one
        elif which == "forget":
            self._forget_of(link, session)
        elif copy is None:
            return
        elif which == "attached":
            copy.attached(command.attached.ticket, link.node.incarnation)
            self._brought.pop(session, None)
        elif which == "state":
            if self._of(link, session) is not None:
                copy.state(command.state)
        elif which == "moved":
            moves = self._brought.get(session, (link, 0))[1] + 1
            router = command.moved.router_incarnation
            self._streams.spawn(self._bring(session, copy, "", router, moves), "a copy is brought to another router")
        elif which == "close" and self._is_brought(session, link):
            # Another holder was earlier, or the session has ended.
            self.forget(session)

    def _forget_of(self, link: RouterLink, session: str) -> None:
        stream = self._streams.by_session.get(session)
        if self._of(link, session) is not None:
            self.forget(session)
        if stream is not None and stream.link is link and stream.has_left:
            stream.copy = None  # its end, which is not told yet, must not keep it

    def of_gone_stream(self, link: RouterLink, command: StreamCommand) -> None:
        """A session began, or went on, with a stream that has ended meanwhile: its router will hear of that, and
        takes the copy for kept here, and for told what is said of the session."""
        which = command.WhichOneof("command")
        if which == "state":
            self.command(link, command)
            return
        begun = getattr(command, which) if which in ("session_bound", "attached") else None
        if begun is not None and begun.HasField("record"):
            copy = SessionCopy.of(link.node.incarnation, begun)
            if copy.resumable and begun.record.id not in self._streams.by_session:
                self.keep(begun.record.id, copy)

    # --- the router that has it is gone, or does not answer ---

    def router_gone(self, link: RouterLink) -> None:
        for session, copy in list(self._copies.items()):
            if self._needs(session, copy, link):
                self._streams.spawn(self._bring_later(session, copy, link), "a copy is brought to another router")

    async def _bring_later(self, session: str, copy: SessionCopy, link: RouterLink) -> None:
        """If the session has a stream, its connector goes first: its client notices less."""
        await asyncio.sleep(STREAMS_FIRST)
        if self._copies.get(session) is copy and self._needs(session, copy, link):
            await self._bring(session, copy, link.node.incarnation, "", 0)

    def _needs(self, session: str, copy: SessionCopy, link: RouterLink) -> bool:
        """Whether a copy is of a session of that router, or was brought there and not taken yet."""
        return copy.router == link.node.incarnation or self._is_brought(session, link)

    def _is_brought(self, session: str, link: RouterLink) -> bool:
        return self._brought.get(session, (None, 0))[0] is link

    def _surrender(self, link: RouterLink, session: str, router: str) -> None:
        """`router`: the one that does not answer. What another one has taken over by now stays there."""
        copy, stream = self._copies.get(session), self._streams.by_session.get(session)
        if copy is not None and copy.router == router:
            if (silent := self._streams.link_now(copy.router)) is not None:
                # When it wakes it must not go on with the session.
                silent.event(0).surrendered.session = session
            self._attach(link, session, copy, 0)
        elif stream is not None and stream.link is not None and stream.link.node.incarnation == router:
            stream.surrender(link)

    async def _bring(self, session: str, copy: SessionCopy, gone: str, to: str, moves: int) -> None:
        """Another router carries the session on from the copy, and lets it wait for its client."""
        link = await (self._streams.link_to(to) if to else self._streams.other_link(gone))
        if self._copies.get(session) is not copy:
            return
        if link is None:
            log.warning("session_not_reattached", session=session, reason="no other router is in reach")
            self.forget(session)
        else:
            self._attach(link, session, copy, moves)

    def _attach(self, link: RouterLink, session: str, copy: SessionCopy, moves: int) -> None:
        self._brought[session] = link, moves
        try:
            copy.bring(link, 0, moves)
        except Overflow:
            log.warning("session_not_reattached", session=session, reason="the router does not take what it is sent")
            self.forget(session)
