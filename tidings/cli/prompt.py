"""Passwords: asked for unseen, or read from a file or standard input; never an argument, which others could see."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from tidings.cli.app import Failed


def read_password(from_file: str | None, prompt: str) -> str:
    """A password. Raises Failed when there is none, or it was mistyped."""
    if from_file and from_file != "-":
        try:
            lines = Path(from_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Failed(f"the password file can't be read: {error}") from None
        password = lines[0] if lines else ""
    elif from_file == "-" or not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = getpass.getpass(f"{prompt}: ")
        if getpass.getpass("The same again: ") != password:
            raise Failed("the two passwords differ; nothing was changed")
    if not password:
        raise Failed("the password is empty; nothing was changed")
    return password
