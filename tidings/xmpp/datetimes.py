"""XEP-0082: points in time as text (3.2, DateTime). Within the server they are milliseconds since 1970."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_DATE_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


def to_text(unix_ms: int) -> str:
    """In UTC, with milliseconds."""
    return (_EPOCH + unix_ms * _MILLISECOND).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_unix_ms(text: str, *, up: bool = False) -> int:
    """The millisecond that a point in time is in; with `up`, the first that is not before it. Raises ValueError."""
    if _DATE_TIME.fullmatch(text) is None:
        raise ValueError("say a time as in 2010-06-07T00:00:00Z")
    since = datetime.fromisoformat(text) - _EPOCH
    return -(-since // _MILLISECOND) if up else since // _MILLISECOND
