"""The links between the routers of a simulated cluster (simulation.py), and what goes over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidings.cluster.forwarding import Item, Mode, Sent

if TYPE_CHECKING:
    from tidings.testing.simulation import Router

# Simulated seconds between two attempts to send what is not confirmed.
RESEND = 0.3


@dataclass(frozen=True, slots=True)
class Message:
    sender: str
    number: int
    to: str


class Link:
    """Numbered packets to one router over a network that delays, doubles, reorders and drops."""

    def __init__(self, router: Router, node: str) -> None:
        self.router = router
        self.node = node
        self.world = router.world
        self.next = 0
        self.packets: dict[int, tuple[Item, Sent, int, int]] = {}
        self.waiting: dict[int, Sent] = {}
        self.expected = 1
        self.arrived: dict[int, Callable[[], None]] = {}
        self.answers: dict[int, tuple[bool, int]] = {}
        self.answered = 1
        self.over = False

    def unanswered(self) -> list[Message]:
        """The messages in what it has sent and that was not answered."""
        payloads = [sent.item.payload for sent in self.waiting.values() if sent.item.mode is not Mode.STRATEGY]
        return [message for it in payloads for message in ([it] if isinstance(it, Message) else it[1][1])]

    def send(self, item: Item, sent: Sent, version: int, seen: int) -> None:
        self.next += 1
        self.packets[self.next] = (item, sent, version, seen)
        self.waiting[self.next] = sent
        self._transmit(self.next)

    def _transmit(self, number: int) -> None:
        if self.over or not self.router.alive or number not in self.packets:
            return
        chance = self.world.random
        for _ in range(chance.choice((0, 1, 1, 1, 1, 2))):
            self.world.later(chance.expovariate(20), lambda: self._arrive(number))
        self.world.later(RESEND, lambda: self._transmit(number))

    def _arrive(self, number: int) -> None:
        target = self.world.routers.get(self.node)
        if self.over or target is None or not target.alive or target.still:
            return  # it is sent again
        if number < self.expected or number not in self.packets:
            return
        item, _, version, seen = self.packets[number]
        self.arrived[number] = lambda: self._take(target, number, item, version, seen)
        while self.expected in self.arrived:
            self.arrived.pop(self.expected)()
            self.expected += 1

    def _take(self, target: Router, number: int, item: Item, version: int, seen: int) -> None:
        self.packets.pop(number, None)

        def answer(done: Item) -> None:
            refused = not done.taken
            by = target.forwarder.view.version if done.mode is Mode.DECIDE else 0
            self.world.later(self.world.random.expovariate(20), lambda: self._answer(number, refused, by))

        copy = Item(
            item.flow, item.account, item.resource, item.payload, item.mode,
            source=self.router.own, guess=item.guess, answer=answer,
        )  # fmt: skip
        target.forwarder.incoming(copy, version, seen)

    def _answer(self, number: int, refused: bool, version: int) -> None:
        """Answers are taken in the order of what they answer, as on a real link."""
        if self.router.puts_off(lambda: self._answer(number, refused, version)):
            return
        self.answers[number] = (refused, version)
        while self.answered in self.answers and not self.over and self.router.alive:
            was_refused, by = self.answers.pop(self.answered)
            sent = self.waiting.pop(self.answered)
            self.answered += 1
            if was_refused:
                self.router.forwarder.refused(sent, by)
            else:
                self.router.forwarder.taken(sent)

    def end(self) -> None:
        self.over = True
        waiting, self.waiting = self.waiting, {}
        for sent in waiting.values():
            self.router.forwarder.lost(sent)
