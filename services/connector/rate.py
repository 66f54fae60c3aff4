"""How fast one client may send."""

from __future__ import annotations

from services.connector.limits import ClientLimits


class Rate:
    """Counts what a client sends in a second, against its limits."""

    __slots__ = ("_bytes", "_ends", "_limits", "_stanzas")

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._ends = 0.0
        self._stanzas = 0
        self._bytes = 0

    def count(self, now: float, size: int, stanzas: int) -> float:
        """Counts bytes and stanzas. Returns 0, or the time until which no more should be read: what came beyond the
        limit is paid off with time, so that three seconds' worth waits three seconds."""
        if now >= self._ends:
            self._ends = now + 1.0
            self._stanzas = stanzas
            self._bytes = size
        else:
            self._stanzas += stanzas
            self._bytes += size
        limits = self._limits
        overdraft = 0.0
        if limits.stanzas_per_second and self._stanzas > limits.stanzas_per_second:
            overdraft = self._stanzas / limits.stanzas_per_second
        if limits.bytes_per_second and self._bytes > limits.bytes_per_second:
            overdraft = max(overdraft, self._bytes / limits.bytes_per_second)
        return self._ends - 1.0 + overdraft if overdraft else 0.0
