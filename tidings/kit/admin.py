"""The admin port: /healthz, /readyz and /metrics, for probes and Prometheus. No secrets, no changes."""

from __future__ import annotations

import errno
from collections.abc import Callable

from aiohttp import web

from tidings.kit.metrics import CONTENT_TYPE, Metrics
from tidings.kit.ports import PortInUse, port_holder


class AdminServer:
    """Serves the admin port of one process."""

    def __init__(self, address: str, port: int, metrics: Metrics, ready: Callable[[], str]) -> None:
        """`ready`: '' when the process serves, else what it waits for."""
        self._address = address
        self._port = port
        self._metrics = metrics
        self._ready = ready
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Raises PortInUse."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._exposition)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._address, self._port).start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(
                    self._address, self._port, port_holder(self._port, self._address), "--admin-port"
                ) from error
            raise

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        waiting = self._ready()
        return web.Response(text=f"{waiting or 'ok'}\n", status=503 if waiting else 200)

    async def _exposition(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
