"""`tidings run`."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from tidings.cli.app import PASS_ON, load_options


@click.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> int:
    """Run services: all of them, or those that are named (connector, router, registry, pubsub).

    All run in this process, or, with --processes=auto, in one for each core.

    \b
    Examples:
      tidings run --virt-hosts=example.org
      tidings run --virt-hosts=example.org --processes=auto
      tidings run connector --registry=127.0.0.11:5777 --bind-address=127.0.0.14
    """
    from tidings.kit import child_process

    supervised = child_process.end_with_parent()
    options, names = load_options(arguments)
    from tidings.kit import logging, supervisor

    count = supervisor.process_count(options, names)
    logging.configure(options["log-format"], options["debug"])
    if count > 1:
        from tidings.cli.client import channel

        return supervisor.run(options, count, lambda: _serving(options, names, channel(options)))
    from tidings.kit import runner

    if supervised:
        from structlog.contextvars import bind_contextvars

        # Several processes write the same log.
        bind_contextvars(process=options["cluster-hostname"].partition(".")[0])
    code = runner.run(
        options,
        names,
        lambda process: _serving(options, names, nullcontext(process.context.server.local_channel())),
    )
    _leave(code)
    return code


def _leave(code: int) -> None:
    """Ends the process at once: all of it is stopped. gRPC's threads can crash while the interpreter is taken down
    around them (seen with grpcio 1.85, as a segmentation fault in one of some hundred ends)."""
    import logging

    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _serving(options: Any, names: list[str], router: AbstractAsyncContextManager[Any]) -> None:
    """All that was to be started serves. `router`: opens a channel to a router."""
    from tidings.kit import notify

    if not names:
        await _welcome(options, router)
    notify.tell_ready()


async def _welcome(options: Any, router: AbstractAsyncContextManager[Any]) -> None:
    """What somebody who has just started the server wants to know."""
    created = None
    if not options["cluster-mode"] and not options["user-db-uri"]:
        async with router as channel:
            created = await _first_account(options, channel)
    if not sys.stdout.isatty():
        return
    from tidings.kit.own_node import local_address

    host = options["virt-hosts"][0]
    bound = local_address(options)
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


async def _first_account(options: Any, channel: Any) -> tuple[str, str] | None:
    """An administrator for a new installation; its password is said once."""
    from tidings.api.router.v1.account_pb2 import CreateAccountRequest, ListAccountsRequest
    from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
    from tidings.kit.logging import get_logger

    accounts: Any = AccountServiceStub(channel)
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
