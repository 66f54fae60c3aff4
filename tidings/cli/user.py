"""`tidings user`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import click

from tidings.cli.app import OK, PASS_ON, USAGE, load_options, paragraph, print_table
from tidings.cli.prompt import read_password


@click.group()
def user() -> None:
    """Add, change, remove and list accounts.

    \b
    Examples:
      tidings user add alice@example.org
      echo 'correct horse' | tidings user passwd alice@example.org
      tidings user list --json
    """


def _accounts(options: Any, call: Callable[[Any], Awaitable[Any]]) -> Any:
    """Calls the AccountService of a router."""

    async def ask() -> Any:
        from tidings.api.router.v1.account_pb2_grpc import AccountServiceStub
        from tidings.cli.client import channel, channel_with

        async with channel(options) as opened:
            return await call(AccountServiceStub(await channel_with(options, opened, "router")))

    return asyncio.run(ask())


def _one_jid(words: list[str], usage: str) -> str:
    if len(words) != 1:
        raise click.UsageError(f"name one account: {usage}")
    return words[0]


@user.command(context_settings=PASS_ON)
@click.option("--password-file", help="Read the password from the first line of a file.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def add(arguments: tuple[str, ...], password_file: str | None) -> int:
    """Add an account. The password is asked for, or read from --password-file or standard input.

    Example: tidings user add alice@example.org
    """
    from tidings.api.router.v1.account_pb2 import CreateAccountRequest

    options, words = load_options(arguments)
    jid = _one_jid(words, "tidings user add alice@example.org")
    request = CreateAccountRequest(jid=jid, password=read_password(password_file, f"Password for {jid}"))
    _accounts(options, lambda accounts: accounts.CreateAccount(request, timeout=30))
    paragraph(f"{jid} can log in now.", "green")
    return OK


@user.command(context_settings=PASS_ON)
@click.option("--password-file", help="Read the password from the first line of a file.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def passwd(arguments: tuple[str, ...], password_file: str | None) -> int:
    """Set a new password. Example: tidings user passwd alice@example.org"""
    from tidings.api.router.v1.account_pb2 import SetPasswordRequest

    options, words = load_options(arguments)
    jid = _one_jid(words, "tidings user passwd alice@example.org")
    request = SetPasswordRequest(jid=jid, password=read_password(password_file, f"New password for {jid}"))
    _accounts(options, lambda accounts: accounts.SetPassword(request, timeout=30))
    paragraph(f"{jid} has a new password.", "green")
    return OK


@user.command(context_settings=PASS_ON)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def remove(arguments: tuple[str, ...]) -> int:
    """Remove an account with all that is stored for it. Example: tidings user remove alice@example.org"""
    from tidings.api.router.v1.account_pb2 import DeleteAccountRequest

    options, words = load_options(arguments)
    jid = _one_jid(words, "tidings user remove alice@example.org")
    _accounts(options, lambda accounts: accounts.DeleteAccount(DeleteAccountRequest(jid=jid), timeout=30))
    paragraph(f"{jid} is gone.", "green")
    return OK


@user.command("list", context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def list_(arguments: tuple[str, ...], as_json: bool) -> int:
    """List accounts, of all virtual hosts or of one. Example: tidings user list example.org --json"""
    from tidings.api.router.v1.account_pb2 import ListAccountsRequest

    options, words = load_options(arguments)
    if len(words) > 1:
        paragraph("error: name one virtual host, or none: tidings user list example.org", "red")
        return USAGE

    async def collect(accounts: Any) -> list[Any]:
        found: list[Any] = []
        token = ""
        while True:
            request = ListAccountsRequest(host=words[0] if words else "", page_token=token)
            page = await accounts.ListAccounts(request, timeout=30)
            found.extend(page.accounts)
            token = page.next_page_token
            if not token:
                return found

    rows = _accounts(options, collect)
    if as_json:
        click.echo(
            json.dumps(
                [{"jid": a.jid, "created_unix_ms": a.created_unix_ms, "resources": list(a.resources)} for a in rows],
                indent=2,
            )
        )
    else:
        print_table(("account", "sessions"), [(a.jid, ", ".join(a.resources) or "-") for a in rows])
    return OK
