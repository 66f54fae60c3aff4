"""`tidings run`."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from tidings.cli.app import PASS_ON, load_options


@click.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> int:
    """Run services in this process: all of them, or those that are named (connector, router, registry, pubsub).

    \b
    Examples:
      tidings run --virt-hosts=example.org
      tidings run connector --registry=127.0.0.11:5777 --bind-address=127.0.0.14
    """
    options, names = load_options(arguments)
    from tidings.kit import logging, runner

    logging.configure(options["log-format"], options["debug"])
    return runner.run(options, names, lambda process: _welcome(options, process, not names))


async def _welcome(options: Any, process: Any, all_of_them: bool) -> None:
    """What somebody who has just started the server wants to know."""
    if not all_of_them:
        return
    created = None
    if not options["cluster-mode"] and not options["user-db-uri"]:
        created = await _first_account(options, process)
    if not sys.stdout.isatty() and os.environ.get("TIDINGS_WELCOME", "") != "always":
        return
    host = options["virt-hosts"][0]
    bound = options["bind-address"][0] if options["bind-address"] else "127.0.0.1"
    bold = click.style
    lines = [
        "",
        bold("Tidings is running.", bold=True, fg="green"),
        f"  Clients      {bound}, port {options['c2s-ports'][0]} (STARTTLS) or {options['c2s-tls-ports'][0]} (TLS),"
        f" as somebody@{host}",
        f"  Cluster      port {options['cluster-port']}; see it with {bold(_command('nodes', options), bold=True)}",
        f"  Add a user   {bold(_command(f'user add alice@{host}', options), bold=True)}",
        f"  Stop         {bold('Ctrl-C', bold=True)}",
    ]
    if created is not None:
        lines.insert(2, f"  Account      {created[0]}, password {bold(created[1], bold=True)} (shown only now)")
    if not options["tls-cert-file"] and not options["certs-dir"]:
        lines.append("  The certificate is self-made: clients will ask whether to trust it.")
    click.echo("\n".join([*lines, ""]))


def _command(words: str, options: Any) -> str:
    """A command as it must be typed to reach this node."""
    program = sys.argv[0]
    if Path(program).name != "tidings" or shutil.which("tidings") == program:
        program = "tidings"
    needed = [
        f"--{name}={value}"
        for name, value in (
            ("bind-address", options["bind-address"][0] if options["bind-address"] else "127.0.0.1"),
            ("cluster-port", options["cluster-port"]),
            ("data-dir", options["data-dir"]),
        )
        if options.source(name) not in ("default", "environment") and ":" not in options.source(name)
    ]
    return " ".join((program, words, *needed))


async def _first_account(options: Any, process: Any) -> tuple[str, str] | None:
    """An administrator for a new installation; its password is said once."""
    from tidings.api.router.v1.account_pb2 import CreateAccountRequest, ListAccountsRequest
    from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
    from tidings.kit.logging import get_logger

    accounts: Any = AccountServiceStub(process.context.server.local_channel())
    if (await accounts.ListAccounts(ListAccountsRequest(page_size=1), timeout=10)).accounts:
        return None
    jid, password = f"admin@{options['virt-hosts'][0]}", secrets.token_urlsafe(12)
    await accounts.CreateAccount(CreateAccountRequest(jid=jid, password=password), timeout=30)
    if sys.stdout.isatty():
        return jid, password
    path = Path(options["data-dir"]) / "admin-password"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(password + "\n")
    get_logger("server").info("admin_account_made", account=jid, password_file=str(path))
    return None
