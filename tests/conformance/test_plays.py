"""Every play, over STARTTLS and over TLS from the first byte, against the installation that --way starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidings.testing.plays import Play, Stage, read
from tidings.testing.server import Installation

PLAYS = [play for path in sorted((Path(__file__).parent / "plays").glob("*.play")) for play in read(path)]


def test_there_are_as_many_plays_as_we_say() -> None:
    assert len(PLAYS) >= 60
    assert len({play.title for play in PLAYS}) == len(PLAYS)


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: f"{play.path.stem}: {play.title}")
@pytest.mark.parametrize("transport", ["starttls", "tls"])
async def test_play(play: Play, transport: str, installation: Installation) -> None:
    await Stage(installation, tls=transport == "tls").perform(play)


async def test_plays_hold_on_another_virtual_host(installation: Installation) -> None:
    for play in PLAYS[:5]:
        await Stage(installation, host="example.net").perform(play)
