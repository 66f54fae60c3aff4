"""The pubsub service; see app.py for how it is put together."""

from tidings.kit.service import ServiceSpec

SERVICE = ServiceSpec(name="pubsub", build="services.pubsub.app:build")
