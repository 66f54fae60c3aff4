"""XEP-0082."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.xmpp import datetimes


@pytest.mark.parametrize(
    ("text", "unix_ms"),
    [
        # 3.2: the first steps on the Moon, in UTC and by the clocks of Houston.
        ("1969-07-21T02:56:15Z", -14159025000),
        ("1969-07-20T21:56:15-05:00", -14159025000),
        ("2010-06-07T00:00:00+00:00", 1275868800000),
        ("2010-06-07T00:00:00.1Z", 1275868800100),
        ("2010-06-07T00:00:00.120Z", 1275868800120),
    ],
)
def test_a_point_in_time_is_read(text: str, unix_ms: int) -> None:
    assert datetimes.to_unix_ms(text) == datetimes.to_unix_ms(text, up=True) == unix_ms


def test_what_is_finer_than_a_millisecond_is_rounded_as_asked() -> None:
    text = "2010-06-07T00:00:00.1234567890123Z"
    assert datetimes.to_unix_ms(text) == 1275868800123
    assert datetimes.to_unix_ms(text, up=True) == 1275868800124


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2010-06-07",
        "00:00:00Z",
        "2010-06-07T00:00:00",
        "2010-06-07 00:00:00Z",
        "20100607T00:00:00Z",
        "2010-13-07T00:00:00Z",
        "2010-06-07T00:00:00+99:99",
        "2010-06-07T00:00:00.Z",
        "2010-06-07T00:00:00Z\n",
        "٢٠١٠-06-07T00:00:00Z",
    ],
)
def test_what_is_no_point_in_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        datetimes.to_unix_ms(text)


@given(st.integers(-62_135_596_800_000, 253_402_300_799_999))
def test_what_is_written_is_read_again(unix_ms: int) -> None:
    assert datetimes.to_unix_ms(datetimes.to_text(unix_ms)) == unix_ms


def test_a_point_in_time_is_written_in_utc_with_milliseconds() -> None:
    assert datetimes.to_text(1278803305007) == "2010-07-10T23:08:25.007Z"
