"""PubsubService."""

from __future__ import annotations

from typing import Any

from tidings.api.pubsub.v1 import pubsub_pb2 as pb
from tidings.api.pubsub.v1.pubsub_pb2_grpc import PubsubServiceServicer
from tidings.kit.component import Component


class PubsubApi(PubsubServiceServicer):
    """Serves pubsub.v1."""

    def __init__(self, component: Component) -> None:
        self._component = component

    async def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: Any) -> pb.GetServiceInfoResponse:
        return pb.GetServiceInfoResponse(
            domains=self._component.domains,
            features=self._component.features,
            routers=len(self._component.links),
        )
