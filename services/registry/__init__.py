"""The registry service; see app.py for how it is put together."""

from tidings.kit.service import ServiceSpec

SERVICE = ServiceSpec(name="registry", build="services.registry.app:build", database=True)
