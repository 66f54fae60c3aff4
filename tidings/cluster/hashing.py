"""Rendezvous hashing: everybody who sees the same names picks the same one for a key."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


def rendezvous(key: str, names: Sequence[str]) -> str:
    """The name that a key belongs to. Only the keys of a name that goes move, and to all others evenly.

    Raises ValueError without names.
    """
    if not names:
        raise ValueError("nobody to choose from")
    data = key.encode()
    return max(names, key=lambda name: (blake2b(data + b"\0" + name.encode(), digest_size=8).digest(), name))
