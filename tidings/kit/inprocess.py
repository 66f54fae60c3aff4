"""gRPC within a process: the same stubs and servicers, without a socket.

Messages are serialised and parsed once a hop and never shared, so that one process cannot hide what would
break two. A call costs some microseconds, where one over loopback costs hundreds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc.aio import EOF, AioRpcError, Metadata

from tidings.kit.tasks import Tasks

# Messages that may wait in a stream in each direction; whoever writes more waits.
WINDOW = 64


# As generated code makes them.
Handler = Any


class _Pipe:
    """One direction of a stream: serialised messages from one task to another."""

    __slots__ = ("_closed", "_getter", "_items", "_putter")

    def __init__(self) -> None:
        self._items: deque[bytes] = deque()
        self._getter: asyncio.Future[None] | None = None
        self._putter: asyncio.Future[None] | None = None
        self._closed = False

    async def put(self, item: bytes) -> None:
        while len(self._items) >= WINDOW and not self._closed:
            self._putter = asyncio.get_running_loop().create_future()
            await self._putter
        if self._closed:
            raise asyncio.InvalidStateError("the call is over")
        self._items.append(item)
        self._wake_getter()

    async def get(self) -> bytes | None:
        """The next message; None at the end."""
        while not self._items:
            if self._closed:
                return None
            self._getter = asyncio.get_running_loop().create_future()
            await self._getter
        item = self._items.popleft()
        if self._putter is not None:
            putter, self._putter = self._putter, None
            if not putter.done():
                putter.set_result(None)
        return item

    def close(self) -> None:
        """No more messages; those that wait can still be taken."""
        self._closed = True
        self._wake_getter()
        if self._putter is not None and not self._putter.done():
            self._putter.set_result(None)

    def _wake_getter(self) -> None:
        getter = self._getter
        if getter is not None:
            self._getter = None
            if not getter.done():
                getter.set_result(None)


class InProcessContext:
    """What a handler gets, in place of `grpc.aio.ServicerContext`."""

    def __init__(self, call: _Call, metadata: Any) -> None:
        self._call = call
        self._metadata = Metadata.from_tuple(tuple(metadata)) if metadata else Metadata()

    @property
    def local(self) -> bool:
        """Says that the caller is this very process."""
        return True

    async def read(self) -> Any:
        return await self._call.read_request()

    async def write(self, message: Any) -> None:
        await self._call.write_response(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self._call.finish(code, details, tuple(trailing_metadata))
        raise grpc.aio.AbortError("the call was aborted")

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def peer(self) -> str:
        return "in-process"

    def cancelled(self) -> bool:
        return self._call.code_ is not None

    def cancel(self) -> None:
        self._call.finish(grpc.StatusCode.CANCELLED, "cancelled by the server")


class _Call:
    """One call, of any kind: what the stub's caller holds."""

    def __init__(
        self,
        handler: Handler,
        serializer: Callable[[Any], bytes],
        deserializer: Callable[[bytes], Any],
        tasks: Tasks,
        timeout: float | None,
        metadata: Any,
    ) -> None:
        self._handler = handler
        self._serializer = serializer
        self._deserializer = deserializer
        self._requests = _Pipe()
        self._responses = _Pipe()
        self.code_: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: tuple[Any, ...] = ()
        context = InProcessContext(self, metadata)
        self._task = tasks.spawn(self._serve(context), "in-process call")
        self._timer = (
            asyncio.get_running_loop().call_later(
                timeout, self.finish, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
            )
            if timeout is not None
            else None
        )

    # --- the server's side ---

    async def _serve(self, context: InProcessContext) -> None:
        try:
            await self._run(context)
            self.finish(grpc.StatusCode.OK, "")
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self.finish(grpc.StatusCode.UNAVAILABLE, "the server has stopped")
            raise
        except Exception as error:
            self.finish(grpc.StatusCode.UNKNOWN, f"the handler failed: {type(error).__name__}")

    async def _run(self, context: InProcessContext) -> None:
        handler: Any = self._handler
        if handler.request_streaming and handler.response_streaming:
            await self._answers(handler.stream_stream(self._request_iterator(), context))
        elif handler.request_streaming:
            await self.write_response(await handler.stream_unary(self._request_iterator(), context))
        else:
            request = await self.read_request()
            if handler.response_streaming:
                await self._answers(handler.unary_stream(request, context))
            else:
                await self.write_response(await handler.unary_unary(request, context))

    async def _answers(self, result: Any) -> None:
        if hasattr(result, "__aiter__"):
            async for message in result:
                await self.write_response(message)
        else:
            await result

    async def _request_iterator(self) -> AsyncIterator[Any]:
        while (request := await self.read_request()) is not EOF:
            yield request

    async def read_request(self) -> Any:
        item = await self._requests.get()
        return EOF if item is None else self._handler.request_deserializer(item)

    async def write_response(self, message: Any) -> None:
        await self._responses.put(self._handler.response_serializer(message))

    def finish(self, code: grpc.StatusCode, details: str, trailing: tuple[Any, ...] = ()) -> None:
        """Ends the call; only the first end counts."""
        if self.code_ is not None:
            return
        self.code_ = code
        self._details = details
        self._trailing = trailing
        if self._timer is not None:
            self._timer.cancel()
        self._requests.close()
        self._responses.close()
        if not self._task.done() and self._task is not asyncio.current_task():
            self._task.cancel()

    # --- the client's side ---

    async def write(self, request: Any) -> None:
        try:
            await self._requests.put(self._serializer(request))
        except asyncio.InvalidStateError:
            raise self._error() from None

    async def done_writing(self) -> None:
        self._requests.close()

    async def read(self) -> Any:
        item = await self._responses.get()
        if item is not None:
            return self._deserializer(item)
        if self.code_ is not grpc.StatusCode.OK:
            raise self._error()
        return EOF

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (response := await self.read()) is not EOF:
            yield response

    def cancel(self) -> bool:
        over = self.code_ is not None
        self.finish(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        return not over

    def done(self) -> bool:
        return self.code_ is not None

    async def code(self) -> grpc.StatusCode:
        await asyncio.wait([self._task])
        assert self.code_ is not None
        return self.code_

    async def details(self) -> str:
        await self.code()
        return self._details

    async def trailing_metadata(self) -> Metadata:
        await self.code()
        return Metadata.from_tuple(self._trailing)

    async def wait_for_connection(self) -> None:
        return None

    def _error(self) -> AioRpcError:
        return AioRpcError(
            self.code_ or grpc.StatusCode.UNKNOWN,
            Metadata(),
            Metadata.from_tuple(self._trailing),
            self._details,
        )

    async def single(self, request: Any | None) -> Any:
        """A call with one response: awaits it."""
        try:
            if request is not None:
                await self.write(request)
                await self.done_writing()
            response = await self.read()
            if self.code_ is None:
                await asyncio.wait([self._task])
            if self.code_ is not grpc.StatusCode.OK:
                raise self._error()
            return response
        finally:
            self.finish(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")


class InProcessServer:
    """Takes servicers as a `grpc.aio.Server` does."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._tasks = Tasks()
        self._stopped = False

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        for method, handler in handlers.items():
            self._handlers[f"/{service}/{method}"] = handler

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Generated code registers its handlers in both ways; the other one is enough."""

    def begin(self, method: str, serializer: Any, deserializer: Any, timeout: float | None, metadata: Any) -> _Call:
        handler = self._handlers.get(method)
        if handler is None or self._stopped:
            code = grpc.StatusCode.UNAVAILABLE if self._stopped else grpc.StatusCode.UNIMPLEMENTED
            raise AioRpcError(code, Metadata(), Metadata(), "the server has stopped" if self._stopped else method)
        return _Call(handler, serializer, deserializer, self._tasks, timeout, metadata)

    async def stop(self) -> None:
        """Ends all calls."""
        self._stopped = True
        await self._tasks.stop()


class InProcessChannel:
    """Where generated stubs end in the same process."""

    def __init__(self, server: InProcessServer) -> None:
        self._server = server

    def unary_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            async def run() -> Any:
                begun = self._server.begin(method, request_serializer, response_deserializer, timeout, metadata)
                return await begun.single(request)

            return run()

        return call

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            begun = self._server.begin(method, request_serializer, response_deserializer, timeout, metadata)
            # One request always fits into the pipe, so nothing has to be waited for.
            begun._requests._items.append(request_serializer(request))
            begun._requests._wake_getter()
            return begun

        return call

    def stream_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(*, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            return self._server.begin(method, request_serializer, response_deserializer, timeout, metadata)

        return call

    def stream_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(*, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            return self._server.begin(method, request_serializer, response_deserializer, timeout, metadata)

        return call

    async def close(self, grace: float | None = None) -> None:
        """Nothing to close: calls belong to the server."""
