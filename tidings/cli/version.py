"""`tidings version`."""

from __future__ import annotations

import json

import click

from tidings import __version__
from tidings.cli.app import OK


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> int:
    """Print the version. Example: tidings version --json"""
    click.echo(json.dumps({"version": __version__}) if as_json else f"tidings {__version__}")
    return OK
