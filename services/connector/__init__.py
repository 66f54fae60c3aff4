"""The connector service; see app.py for how it is put together."""

from tidings.kit.service import ServiceSpec

SERVICE = ServiceSpec(name="connector", build="services.connector.app:build")
