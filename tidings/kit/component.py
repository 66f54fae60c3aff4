"""Components: services with a domain of their own, attached to every router (component.v1).

class Weather(Component):
    def __init__(self, context):
        super().__init__(context, "weather", domains=["weather.{vhost}"], title="Weather")
        self.on_iq("get", "{urn:example:weather}now", self.now)

    async def now(self, iq: Stanza) -> bytes:
        return b"<now xmlns='urn:example:weather'>sunny</now>"
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.common.v1.stanza_pb2 import Envelope, Feed
from tidings.api.component.v1 import component_pb2 as pb
from tidings.api.component.v1.component_pb2_grpc import ComponentServiceStub
from tidings.cluster.node import Node, NodeState
from tidings.kit.link import INTERVAL, Outbox, Overflow, why_ended
from tidings.kit.logging import get_logger
from tidings.kit.module import IQ, KIND_NAMES, MESSAGE, PRESENCE, Stanza
from tidings.kit.service import Context
from tidings.kit.tasks import Tasks
from tidings.xmpp import ns
from tidings.xmpp.errors import StanzaError
from tidings.xmpp.stanza import attribute, error_stanza, iq_result, quoteattr

log = get_logger("component")

REGISTER_TIMEOUT = 5.0
RETRY = 0.5
# Stanzas that are worked on at once; more wait at the routers.
CONCURRENCY = 256

IqHandler = Callable[[Stanza], Awaitable[bytes] | bytes]
StanzaHandler = Callable[[Stanza], Awaitable[None] | None]


class Component:
    """One instance of a component. A `tidings.kit.service.Service`; subclass it, or register handlers.

    Guaranteed: each IQ request is answered once, with what its handler returns or raises. Not guaranteed:
    that stanzas of different senders are handled in the order of their arrival.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        *,
        domains: Sequence[str] = (),
        title: str = "",
        routing_key: pb.RoutingKey.ValueType = pb.RoutingKey.ROUTING_KEY_BARE_TO,
        account_namespaces: Sequence[str] = (),
        feeds: Sequence[Feed.ValueType] = (),
        identity: tuple[str, str] = ("component", "generic"),
    ) -> None:
        self.context = context
        self.name = name
        self.title = title
        self.identity = identity
        self.features: list[str] = [ns.DISCO_INFO, ns.DISCO_ITEMS]
        # The domains as the routers wrote them out, and the links to them, by router.
        self.domains: list[str] = []
        self.links: dict[str, Outbox[pb.AttachRequest]] = {}
        self._registration = pb.Registration(
            instance=secrets.token_hex(8), domains=domains, routing_key=routing_key, title=title,
            account_namespaces=account_namespaces, feeds=feeds,
        )  # fmt: skip
        self._iq: dict[tuple[str, str], IqHandler] = {}
        self._others: dict[int, StanzaHandler] = {}
        self._feeds: Callable[[Envelope], None] | None = None
        # By router: what keeps this component attached to it.
        self._keeping: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()
        self._working = asyncio.Semaphore(CONCURRENCY)
        self.on_iq("get", f"{{{ns.DISCO_INFO}}}query", self._info)
        self.on_iq("get", f"{{{ns.DISCO_ITEMS}}}query", self._items)

    # --- what it does ---

    def on_iq(self, type_: str, payload: str, handler: IqHandler) -> None:
        """Answers IQ requests with this payload (`{namespace}name`); the handler gives the result's payload."""
        self._iq[type_, payload] = handler

    def on_message(self, handler: StanzaHandler) -> None:
        self._others[MESSAGE] = handler

    def on_presence(self, handler: StanzaHandler) -> None:
        self._others[PRESENCE] = handler

    def on_feed(self, handler: Callable[[Envelope], None]) -> None:
        """Gets the copies that `feeds` asks for."""
        self._feeds = handler

    def send(self, raw: bytes) -> bool:
        """Sends a stanza with `from` and `to`, through any router that lives; False when none is there to take it."""
        attached = [node for node in self.context.member.view.living_routers() if node.incarnation in self.links]
        for node in sorted(attached, key=lambda node: node.state is not NodeState.UP):
            try:
                self.links[node.incarnation].begin(len(raw)).add(stanza=raw)
                return True
            except Overflow:
                continue  # that link is about to be ended
        return False

    # --- life ---

    async def start(self) -> None:
        self.context.member.on_change(lambda _view: self._look())
        self._look()

    async def drain(self) -> None:
        """Routers pick another instance when this one has gone."""

    async def stop(self) -> None:
        await self._tasks.stop()

    # --- routers ---

    def _look(self) -> None:
        view = self.context.member.view
        for node in view.with_service("router"):
            if node.state in (NodeState.UP, NodeState.SUSPECT) and node.incarnation not in self._keeping:
                task = self._tasks.spawn(self._keep(node), f"{self.name}: link to {node.hostname}")
                self._keeping[node.incarnation] = task
        # What a router says that has failed counts no more.
        for gone in set(self._keeping) - {node.incarnation for node in view.living_routers()}:
            self._keeping.pop(gone).cancel()

    async def _keep(self, node: Node) -> None:
        """Stays attached to a router until cancelled: it has failed or is gone."""
        told = False
        while True:
            why, refusal = await why_ended(self._attach(node), node, self.context.member)
            # A refusal has a reason and is worth an error, once; all else passes.
            final = refusal is not None and refusal.reason != ErrorReason.ERROR_REASON_NOT_SERVING
            (log.error if final and not told else log.debug)(
                "component_not_attached", component=self.name, router=node.hostname, reason=why
            )
            told = told or final
            await asyncio.sleep(RETRY)

    async def _attach(self, node: Node) -> None:
        local = node.incarnation == self.context.node.incarnation
        outbox: Outbox[pb.AttachRequest] = Outbox(pb.AttachRequest, 0 if local else INTERVAL)
        outbox.begin_item().registration.CopyFrom(self._registration)
        stub: Any = ComponentServiceStub(self.context.channels.to(node))
        call: Any = stub.Attach(metadata=(("tidings-service", self.name),))
        writers = Tasks(lambda _name, _error: call.cancel())
        writers.spawn(outbox.run(call.write), f"{self.name}: writes to {node.hostname}")
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT):
                response = await call.read()
            if response is grpc.aio.EOF:
                return
            self.context.member.reaches(node)
            self.domains = list(response.registered.domains)
            self.links[node.incarnation] = outbox
            log.debug("component_attached", component=self.name, router=node.hostname)
            while response is not grpc.aio.EOF:
                outbox.received = response.sequence
                for envelope in response.envelopes:
                    if envelope.feed:
                        if self._feeds is not None:
                            self._feeds(envelope)
                    else:
                        await self._working.acquire()
                        self._tasks.spawn(self._handle(outbox, envelope), f"{self.name}: stanza")
                response = await call.read()
        finally:
            self.links.pop(node.incarnation, None)
            call.cancel()
            await writers.stop()

    # --- stanzas ---

    async def _handle(self, outbox: Outbox[pb.AttachRequest], envelope: Envelope) -> None:
        stanza = Stanza(envelope)
        try:
            if envelope.kind == IQ:
                if envelope.type in ("get", "set"):
                    answer = await self._answer(stanza)
                    raw = iq_result(envelope.id, envelope.from_jid, envelope.to_jid, answer)
                    outbox.begin(len(raw)).add(stanza=raw)
                return
            handler = self._others.get(envelope.kind)
            if handler is None:
                if envelope.kind == MESSAGE and envelope.type not in ("error", "headline"):
                    raise StanzaError("service-unavailable")
                return
            result = handler(stanza)
            if result is not None:
                await result
        except StanzaError as error:
            self._refuse(outbox, envelope, error)
        except Exception:
            log.exception("component_stanza_failed", component=self.name)
            self._refuse(outbox, envelope, StanzaError("internal-server-error"))
        finally:
            self._working.release()

    async def _answer(self, stanza: Stanza) -> bytes:
        handler = self._iq.get((stanza.type, stanza.children[0] if stanza.children else ""))
        if handler is None:
            raise StanzaError("service-unavailable")
        answer = handler(stanza)
        return answer if isinstance(answer, bytes) else await answer

    def _refuse(self, outbox: Outbox[pb.AttachRequest], envelope: Envelope, error: StanzaError) -> None:
        if envelope.type == "error":
            return
        raw = error_stanza(KIND_NAMES[envelope.kind], envelope.id, error, from_=envelope.to_jid, to=envelope.from_jid)
        outbox.begin(len(raw)).add(stanza=raw)

    # --- XEP-0030 ---

    def _info(self, iq: Stanza) -> bytes:
        if iq.payload.get("node"):
            raise StanzaError("item-not-found")
        category, type_ = self.identity
        features = "".join(f"<feature var={quoteattr(feature)}/>" for feature in sorted(self.features))
        return (
            f"<query xmlns='{ns.DISCO_INFO}'>"
            f"<identity category='{category}' type='{type_}'{attribute('name', self.title)}/>{features}</query>"
        ).encode()

    def _items(self, iq: Stanza) -> bytes:
        if iq.payload.get("node"):
            raise StanzaError("item-not-found")
        return f"<query xmlns='{ns.DISCO_ITEMS}'/>".encode()
