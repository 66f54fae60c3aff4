"""`tidings completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from tidings.cli.app import OK, Failed, app


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script for a shell. Example: eval "$(tidings completion bash)" """
    found = get_completion_class(shell)
    if found is None:
        raise Failed(f"no completion for {shell}")
    click.echo(found(app, {}, "tidings", "_TIDINGS_COMPLETE").source())
    return OK
