"""The command line, `tidings`. One file for each command; each is imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code (see `tidings --help`)."""
    from tidings.cli.app import app

    try:
        result = app.main(
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog_name="tidings",
            standalone_mode=False,
        )
    except Exception as error:
        from tidings.cli.app import report

        return report(error)
    return int(result or 0)
