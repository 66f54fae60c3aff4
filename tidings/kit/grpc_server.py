"""The one builder of gRPC servers: mutual TLS, access control, typed errors, health and reflection."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.kit.access import allowed
from tidings.kit.identity import Caller
from tidings.kit.inprocess import Handler, InProcessChannel, InProcessServer
from tidings.kit.logging import get_logger
from tidings.kit.pki import KeyPair
from tidings.kit.ports import PortInUse, port_holder
from tidings.kit.rpc_errors import TidingsError

log = get_logger("cluster")

OPTIONS: tuple[tuple[str, int], ...] = (
    # Without it a second server on the same port binds in silence, and calls land in either.
    ("grpc.so_reuseport", 0),
    # A dead peer is noticed on idle streams too.
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Dialling sides ask every second; gRPC would take that for an attack.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    # Nor does it matter when two of them come together, because one was late.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    # A batch is at most 1 MiB of stanzas; the rest is margin.
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
)

# Seconds that a call of somebody unknown waits for a newer view: it may have joined a moment ago.
VIEW_WAIT = 2.0

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller(context: Any) -> Caller:
    """Who makes the call that is being handled."""
    return _caller.get()


class ClusterServer:
    """This process's server on the cluster port, and the in-process one beside it, with the same servicers."""

    def __init__(
        self,
        addresses: Sequence[str],
        port: int,
        key_pair: KeyPair,
        roots: Callable[[], bytes],
        identify: Callable[[bytes], Caller | None],
        own: Caller,
        newer_view: Callable[[float], Awaitable[bool]] | None = None,
    ) -> None:
        """`roots`: the certificates that are accepted now (PEM). `newer_view`: waits for the view to change."""
        self._addresses = list(addresses)
        self._port = port
        self._key_pair = key_pair
        self._roots = roots
        self._identify = identify
        self._own = own
        self._newer_view = newer_view
        self._server: grpc.aio.Server = grpc.aio.server(options=OPTIONS)
        self._local = InProcessServer()
        self._services: list[str] = []
        self._held: set[str] = set()
        # Calls of other processes that are being handled.
        self._running: dict[asyncio.Task[Any], tuple[str, Caller]] = {}
        self._health = health.aio.HealthServicer()

    # --- building ---

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: Any, service: str) -> None:
        """Adds a servicer by its generated `add_…_to_server`. `service`: its full name."""
        self._services.append(service)
        add_to_server(servicer, _Guarding(self))

    @property
    def services(self) -> list[str]:
        return list(self._services)

    def hold(self, services: Iterable[str]) -> None:
        """Answers calls of these services with UNAVAILABLE (NOT_SERVING) until `open`: they are starting."""
        self._held.update(services)

    def open(self, services: Iterable[str]) -> None:
        """These services have started."""
        self._held.difference_update(services)

    def local_channel(self) -> InProcessChannel:
        """Where stubs of this process end."""
        return InProcessChannel(self._local)

    # --- life ---

    async def start(self) -> None:
        """Binds every address and serves. Raises PortInUse."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, _Guarding(self))
        names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), _Guarding(self))
        for address in self._addresses:
            credentials = self._credentials()
            literal = f"[{address}]" if ":" in address else address
            try:
                bound = self._server.add_secure_port(f"{literal}:{self._port}", credentials)
            except RuntimeError:
                bound = 0
            if not bound:
                raise PortInUse(address, self._port, port_holder(self._port, address), "--cluster-port")
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace: float = 1.0) -> None:
        """Ends in-process calls, then waits `grace` seconds for those of others."""
        await self._health.enter_graceful_shutdown()
        await self._local.stop()
        await self._server.stop(grace)

    # --- TLS ---

    def _credentials(self) -> grpc.ServerCredentials:
        """For one address: gRPC asks at each handshake whether those that are accepted have changed."""
        accepted = self._roots()

        def configuration() -> Any:
            pair = (self._key_pair.private_key, self._key_pair.certificate)
            return grpc.ssl_server_certificate_configuration([pair], accepted)

        def fresh() -> Any:
            nonlocal accepted
            now = self._roots()
            if now == accepted:
                return None
            accepted = now
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), fresh, True)

    # --- each call ---

    def guarded(self, method: str, handler: Handler) -> Handler:
        """A handler behind access control and the mapping of errors."""
        handler_: Any = handler
        behaviour = handler_.unary_unary or handler_.unary_stream or handler_.stream_unary or handler_.stream_stream
        if inspect.isasyncgenfunction(behaviour):

            async def generate(request: Any, context: Any) -> Any:
                try:
                    with self._running_call(method, await self._admit(method, context)):
                        async for response in behaviour(request, context):
                            yield response
                except Exception as error:
                    await _refuse(error, method, context)

            guarded: Any = generate
        else:

            async def run(request: Any, context: Any) -> Any:
                try:
                    with self._running_call(method, await self._admit(method, context)):
                        return await behaviour(request, context)
                except Exception as error:
                    return await _refuse(error, method, context)

            guarded = run
        return handler_._replace(
            unary_unary=guarded if handler_.unary_unary else None,
            unary_stream=guarded if handler_.unary_stream else None,
            stream_unary=guarded if handler_.stream_unary else None,
            stream_stream=guarded if handler_.stream_stream else None,
        )

    @contextmanager
    def _running_call(self, method: str, caller: Caller) -> Iterator[None]:
        """Notes who makes the call, for its handler and for `view_changed`."""
        _caller.set(caller)
        task = asyncio.current_task()
        if caller.kind == "local" or task is None:
            yield
            return
        self._running[task] = (method, caller)
        try:
            yield
        finally:
            self._running.pop(task, None)

    def view_changed(self) -> None:
        """Ends the calls of those who are no longer who they were: a failed node is refused on open streams too."""
        for task, (method, caller) in list(self._running.items()):
            now = self._identify(caller.certificate.encode())
            if (
                now is None
                or not allowed(method, now)
                or ("" not in (caller.incarnation, now.incarnation) and caller.incarnation != now.incarnation)
            ):
                log.info("call_ended", method=method, caller=caller.name, incarnation=caller.incarnation)
                task.cancel()

    async def _admit(self, method: str, context: Any) -> Caller:
        if getattr(context, "local", False):
            self._check_started(method)
            return self._own
        shown = context.auth_context().get("x509_pem_cert")
        caller = self._identify(shown[0]) if shown else None
        if caller is not None:
            self._check_started(method)
        unknown = caller is None or (caller.kind == "joiner" and not allowed(method, caller))
        if unknown and shown and self._newer_view is not None:
            # A node that has just joined is in the registry's view before it is in ours.
            deadline = asyncio.get_running_loop().time() + VIEW_WAIT
            while caller is None or not allowed(method, caller):
                left = deadline - asyncio.get_running_loop().time()
                if left <= 0 or not await self._newer_view(left):
                    break
                caller = self._identify(shown[0])
        if caller is None or not allowed(method, caller):
            name = f"{caller.kind} {caller.name!r}" if caller else "this caller"
            log.warning("call_refused", method=method, caller=name)
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_ALLOWED, f"{name} may not call {method}")
        self._check_started(method)
        return caller

    def _check_started(self, method: str) -> None:
        """Only who has a name is told; strangers learn nothing."""
        if self._held and method.partition("/")[0] in self._held:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_SERVING, "the service is starting; try again in a moment")


class _Guarding:
    """Stands in for a server while servicers are added: every handler is guarded, then added to both."""

    def __init__(self, server: ClusterServer) -> None:
        self._server = server

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        guarded = {name: self._server.guarded(f"{service}/{name}", handler) for name, handler in handlers.items()}
        real = self._server._server
        real.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))
        if hasattr(real, "add_registered_method_handlers"):
            real.add_registered_method_handlers(service, guarded)
        self._server._local.add_registered_method_handlers(service, guarded)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The same handlers as above, in another form."""


async def _refuse(error: Exception, method: str, context: Any) -> Any:
    """Tells a caller what went wrong, and no more than that."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, TidingsError):
        await context.abort(error.status, error.message, error.trailing())
    if isinstance(error, grpc.aio.UsageError | asyncio.InvalidStateError):
        raise error  # the call is over already
    number = secrets.token_hex(4)
    log.error("call_failed", method=method, error_id=number, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error; the log has it under the id {number}")
