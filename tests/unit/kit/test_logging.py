"""Logs."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from tidings.kit.logging import configure, get_logger


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_debug_switches_its_categories_alone(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", ["cluster"])
    get_logger("cluster").debug("beat_missed", node="n1")
    get_logger("router").debug("session_bound")
    get_logger("router").info("resource_conflict")
    assert [(line["category"], line["event"]) for line in lines(capsys)] == [
        ("cluster", "beat_missed"),
        ("router", "resource_conflict"),
    ]


def test_all_switches_everything(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", ["all"])
    get_logger("database").debug("transaction_again")
    assert lines(capsys)[0]["level"] == "debug"


def test_secrets_and_bodies_are_never_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    get_logger("server").warning("oops", password="hunter2", secret="s3cret", body="love", stanza=b"<x/>", data="d")
    text = capsys.readouterr().err
    for word in ("hunter2", "s3cret", "love", "<x/>"):
        assert word not in text


def test_errors_bring_their_traceback_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    try:
        raise KeyError("x")
    except KeyError:
        get_logger("server").exception("broke")
    (line,) = lines(capsys)
    assert "KeyError" in line["exception"]


def test_a_call_that_was_cancelled_before_it_began_is_no_error_but_what_grpc_could_not_do_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """grpcio logs both alike."""
    configure("json")
    for error in (asyncio.CancelledError(), KeyError("x")):
        try:
            raise error
        except BaseException:
            logging.getLogger("grpc._cython.cygrpc").exception("not handled in servicer method [/x/Y]")
    (line,) = lines(capsys)
    assert "KeyError" in line["exception"]
