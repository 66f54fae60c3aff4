"""`tidings cert`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tidings.cli.app import OK, PASS_ON, Failed, load_options, paragraph


@click.group()
def cert() -> None:
    """Make certificates for other programs. Example: tidings cert client backup"""


@cert.command(context_settings=PASS_ON)
@click.option("--out", default=".", help="The folder to write to.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def client(arguments: tuple[str, ...], out: str) -> int:
    """Write NAME.crt, NAME.key and ca.crt, with which a program may call the cluster's API under that name.

    It is signed with --cluster-secret, or else with the secret in --data-dir. Example: tidings cert client backup
    """
    from tidings.cli.client import keys

    options, words = load_options(arguments)
    if len(words) != 1 or not words[0].replace("-", "").replace("_", "").isalnum():
        raise Failed("name one program, by letters, digits, - and _: tidings cert client backup")
    name = words[0]
    pair, roots = keys(options, name)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content, mode in (
        (f"{name}.crt", pair.certificate, 0o644),
        (f"{name}.key", pair.private_key, 0o600),
        ("ca.crt", roots, 0o644),
    ):
        descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        os.chmod(folder / file, mode)
    paragraph(f"{folder / name}.crt, {folder / name}.key and {folder / 'ca.crt'} are written.", "green")
    return OK
