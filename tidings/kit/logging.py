"""Logs: events with fields, for people on a terminal and as JSON elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import structlog

CATEGORIES = ("server", "cluster", "connector", "router", "registry", "pubsub", "component", "database")

# Never in a log, at any level.
_PRIVATE = frozenset(("password", "secret", "body", "stanza", "data", "private_key"))


def get_logger(category: str) -> Any:
    """The logger of a category, which `--debug` switches to detail."""
    return structlog.stdlib.get_logger(f"tidings.{category}")


def _is_no_cancelled_call(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def configure(log_format: str = "auto", debug: list[str] | tuple[str, ...] = ()) -> None:
    """Sets logging up for this process. `debug`: categories, or "all"."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _category,
        _mask,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[Any]
    if as_json:
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        final = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=28)]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    # grpcio calls it an error when a call is cancelled that has not begun, or is ending: callers do that, and stops.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_cancelled_call)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tidings").setLevel(logging.INFO)
    for category in CATEGORIES:
        detailed = category in debug or "all" in debug
        logging.getLogger(f"tidings.{category}").setLevel(logging.DEBUG if detailed else logging.NOTSET)


def _category(logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    name = cast(str, getattr(logger, "name", "") or "")
    event.setdefault("category", name.removeprefix("tidings."))
    return event


def _mask(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for name in _PRIVATE.intersection(event):
        event[name] = "********"
    return event
