"""The commands, and what they have in common."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import click

OK, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 3

# Command: where its function is, and the line that the list of commands shows.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("tidings.cli.run:run", "Run services: all, or those that are named."),
    "user": ("tidings.cli.user:user", "Add, change, remove and list accounts."),
    "nodes": ("tidings.cli.nodes:nodes", "List the nodes of the cluster, or watch them live."),
    "drain": ("tidings.cli.drain:drain", "Have a node hand over what it has, and leave."),
    "options": ("tidings.cli.options:options", "List all options with value, source and meaning."),
    "check": ("tidings.cli.check:check", "Look for what is wrong, and say how to mend it."),
    "cert": ("tidings.cli.cert:cert", "Make certificates for other programs."),
    "completion": ("tidings.cli.completion:completion", "Print the completion script for a shell."),
    "version": ("tidings.cli.version:version", "Print the version."),
}

# Options are Tidings' own (`--name=value`), not click's: they are handed on as they are.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["--help", "-h"]}


class Lazy(click.Group):
    """Imports a command when it is called, so that each starts fast."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, function = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["--help", "-h"]})
def app() -> None:
    """Tidings, a clustered XMPP server.

    Every command takes all options, as --name=value, and reads the same option files; `tidings options` lists
    them. Example: tidings run --virt-hosts=example.org

    Exit codes: 0 done; 1 failed; 2 wrong usage or options; 3 the node could not be reached.
    """


def load_options(arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Options and positional words of a command. Raises OptionError."""
    from tidings.kit.options import load, split_arguments

    options, rest = split_arguments(arguments)
    return load(options), rest


def paragraph(text: str, colour: str = "") -> None:
    click.echo(click.style(text, fg=colour) if colour else text, err=True)


def report(error: Exception) -> int:
    """Says what went wrong, in a way that helps; the exit code."""
    from tidings.kit.options import OptionError

    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return 130
    if isinstance(error, OptionError):
        for problem in error.problems:
            paragraph(f"error: {problem}", "red")
        return USAGE
    if isinstance(error, Unreachable):
        paragraph(f"error: {error}", "red")
        return UNREACHABLE
    if type(error).__name__ in (
        "PortInUse",
        "PkiError",
        "CertificateProblem",
        "Refused",
        "MigrationError",
        "DatabaseAway",
        "Failed",
        "ServiceProblem",
    ):
        paragraph(f"error: {error}", "red")
        return FAILED
    raise error


class Unreachable(Exception):
    """The node that a command talks to does not answer."""


class Failed(Exception):
    """What was asked can't be done; the text says why."""


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people."""
    from rich.console import Console

    Console(file=sys.stdout).print(make_table(header, rows))


def make_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Cells are strings, which are shown as they are, or rich's texts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table
