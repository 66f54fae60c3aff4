"""`tidings options`."""

from __future__ import annotations

import json

import click

from tidings.cli.app import OK, PASS_ON, load_options, print_table


@click.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def options(arguments: tuple[str, ...], as_json: bool) -> int:
    """List all options: name, value (secrets masked), where the value came from, and what it means.

    Example: tidings options --virt-hosts=example.org
    """
    loaded, _ = load_options(arguments)
    rows = [
        {
            "name": f"--{key or option.name}" if option.pattern else f"--{option.name}{f'[{key}]' if key else ''}",
            "value": value, "source": source, "meaning": option.meaning, "default": option.default,
        }
        for option, key, value, source in loaded.rows()
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        print_table(
            ("option", "value", "from", "meaning"),
            [(row["name"], row["value"], row["source"], row["meaning"]) for row in rows],
        )
    return OK
