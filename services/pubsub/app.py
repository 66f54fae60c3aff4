"""How the publish-subscribe service is put together.

It is an ordinary component. What it serves so far is discovery; nodes and items come with its model.
"""

from __future__ import annotations

from services.pubsub.grpc_api import PubsubApi
from tidings.api.pubsub.v1.pubsub_pb2 import DESCRIPTOR
from tidings.api.pubsub.v1.pubsub_pb2_grpc import add_PubsubServiceServicer_to_server
from tidings.kit.component import Component
from tidings.kit.service import Context


def build(context: Context) -> Component:
    pubsub = Component(
        context,
        "pubsub",
        domains=["pubsub.{vhost}"],
        title="Publish-Subscribe",
        identity=("pubsub", "service"),
    )
    context.server.add(
        add_PubsubServiceServicer_to_server,
        PubsubApi(pubsub),
        DESCRIPTOR.services_by_name["PubsubService"].full_name,
    )
    return pubsub
