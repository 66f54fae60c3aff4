"""The router service; see app.py for how it is put together."""

from tidings.kit.service import ServiceSpec

SERVICE = ServiceSpec(name="router", build="services.router.app:build", database=True)
