"""ConnectorService: shows the client streams and ends one on request."""

from __future__ import annotations

from typing import Any

from services.connector.streams import Streams
from tidings.api.common.v1.error_pb2 import ErrorReason
from tidings.api.connector.v1 import connector_pb2 as pb
from tidings.api.connector.v1.connector_pb2_grpc import ConnectorServiceServicer
from tidings.kit.rpc_errors import TidingsError

MAX_PAGE = 1000


class ConnectorApi(ConnectorServiceServicer):
    """Serves connector.v1."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def ListStreams(self, request: pb.ListStreamsRequest, context: Any) -> pb.ListStreamsResponse:
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        found = self._streams.after(request.after, size + 1)
        response = pb.ListStreamsResponse(more=len(found) > size)
        for stream in found[:size]:
            host, port = stream.peer
            link = stream.link
            response.streams.add(
                stream=stream.number,
                transport=stream.transport_kind,
                remote_address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                tls=stream.encrypted,
                jid=stream.jid,
                send_queue_bytes=stream.send_queue_bytes(),
                router_incarnation=link.node.incarnation if link is not None else "",
            )
        return response

    async def CloseStream(self, request: pb.CloseStreamRequest, context: Any) -> pb.CloseStreamResponse:
        stream = self._streams.get(request.stream)
        if stream is None:
            raise TidingsError(ErrorReason.ERROR_REASON_NOT_FOUND, f"there is no stream {request.stream}")
        try:
            stream.close(request.condition or "policy-violation", request.text)
        except ValueError as error:
            raise TidingsError(ErrorReason.ERROR_REASON_BAD_REQUEST, str(error)) from None
        return pb.CloseStreamResponse()
