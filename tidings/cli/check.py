"""`tidings check`: what is wrong, and how to mend it."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from tidings.cli.app import FAILED, OK, PASS_ON, load_options

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}

# Days before a certificate ends from which on it is worth a warning.
EXPIRY_DAYS = 21


class Finding(NamedTuple):
    """One thing that was looked at."""

    subject: str
    # "ok", "warning" or "error".
    verdict: str
    # A sentence; for what is not ok with what to do.
    text: str


@click.command(context_settings=PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def check(arguments: tuple[str, ...], as_json: bool) -> int:
    """Look at configuration, folder, ports, names, certificates and database, and say what to mend.

    Ends with 1 when something is an error. Example: tidings check --config=/etc/tidings/init.properties
    """
    options, _ = load_options(arguments)
    findings = [Finding("options", "ok", "all options are in order")]
    for look in (_folder, _ports, _names, _certificates, _database):
        findings.extend(look(options))
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            mark = click.style(f"{finding.verdict:8}", fg=_COLOURS[finding.verdict])
            click.echo(f"{mark} {finding.subject:12} {finding.text}")
    return FAILED if any(finding.verdict == "error" for finding in findings) else OK


def _folder(options: Any) -> Iterator[Finding]:
    folder = Path(options["data-dir"])
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    if not os.access(nearest, os.W_OK):
        yield Finding(
            "data-dir", "error", f"{nearest} can't be written to; choose another --data-dir, or change its owner"
        )
        return
    secret = folder / "cluster-secret"
    if secret.exists() and secret.stat().st_mode & 0o077:
        yield Finding("data-dir", "error", f"{secret} can be read by others; say `chmod 600 {secret}`")
        return
    yield Finding("data-dir", "ok", f"{folder} is in order" if folder.exists() else f"{folder} will be made")


def _ports(options: Any) -> Iterator[Finding]:
    from tidings.kit.own_node import cluster_addresses
    from tidings.kit.ports import port_holder

    everywhere = options["bind-address"] or ["0.0.0.0"]  # noqa: S104 - what the server would do
    wanted = [("--c2s-ports", address, port) for address in everywhere for port in options["c2s-ports"]]
    wanted += [("--c2s-tls-ports", address, port) for address in everywhere for port in options["c2s-tls-ports"]]
    wanted += [("--cluster-port", address, options["cluster-port"]) for address in cluster_addresses(options)]
    if options["admin-port"]:
        wanted.append(("--admin-port", options["admin-bind-address"] or "127.0.0.1", options["admin-port"]))
    taken = 0
    for option, address, port in wanted:
        problem = _bind(address, port)
        if problem is None:
            continue
        taken += 1
        holder = port_holder(port, address) or "another program"
        if problem == "in use" and "tidings" in holder:
            yield Finding("ports", "ok", f"{port} is held by {holder}: the node runs")
        elif problem == "in use":
            yield Finding("ports", "error", f"{port} is held by {holder}; stop it, or set {option}")
        else:
            yield Finding("ports", "error", f"{port} on {address}: {problem}; set --bind-address or {option}")
    if not taken:
        yield Finding("ports", "ok", f"{', '.join(sorted({str(port) for _, _, port in wanted}))} are free")


def _bind(address: str, port: int) -> str | None:
    """Why a port can't be bound; None when it can."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return "in use" if error.errno == 98 else os.strerror(error.errno or 0)
    return None


def _names(options: Any) -> Iterator[Finding]:
    from tidings.kit.options import OptionError
    from tidings.kit.own_node import authorities, own_keys, own_node, own_place
    from tidings.kit.pki import PkiError

    try:
        place = own_place(options, ("registry", "router"))
        keys = own_keys(options, authorities(options)[0], place.name)
        node = own_node(options, ("registry", "router"), keys, place)
    except OptionError as error:
        for problem in error.problems:
            yield Finding("names", "error", problem)
        return
    except (PkiError, OSError, ValueError) as error:
        yield Finding("names", "error", str(error))
        return
    yield Finding("names", "ok", f"this node is {node.hostname}, and peers dial {node.address}:{node.port}")
    for host in options["virt-hosts"]:
        if host == "localhost":
            yield Finding(
                "names",
                "warning",
                "the virtual host is localhost: only this machine's users can use it; set --virt-hosts",
            )


def _certificates(options: Any) -> Iterator[Finding]:
    from tidings.kit.pki import certificate_files

    for host in options["virt-hosts"]:
        certificate, key = options.for_host(host, "tls-cert-file"), options.for_host(host, "tls-key-file")
        folder = options["certs-dir"]
        if bool(certificate) != bool(key):
            yield Finding("certificate", "error", f"{host}: set both --tls-cert-file and --tls-key-file")
            continue
        if not certificate and folder and (files := certificate_files(Path(folder), host)) is not None:
            certificate, key = files
        if not certificate:
            yield Finding(
                "certificate",
                "warning",
                f"{host} will show a self-made one, and clients will ask whether to trust it; set "
                "--tls-cert-file and --tls-key-file",
            )
            continue
        yield _certificate(host, Path(certificate), Path(key))


def _certificate(host: str, certificate: Path, key: Path) -> Finding:
    import ssl

    from cryptography import x509

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        return Finding("certificate", "error", f"{host}: {certificate} with {key} can't be used: {error}")
    left = parsed.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if left.days < 0:
        return Finding(
            "certificate",
            "error",
            f"{host}: {certificate} ended on {parsed.not_valid_after_utc:%Y-%m-%d}; get a new one",
        )
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        listed = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    except x509.ExtensionNotFound:
        listed = []
    ascii_host = host.encode("idna").decode()
    if ascii_host not in listed and f"*.{ascii_host.partition('.')[2]}" not in listed:
        return Finding(
            "certificate",
            "error",
            f"{host}: {certificate} is made out to {', '.join(listed) or 'nobody'}; clients will refuse it",
        )
    if left.days < EXPIRY_DAYS:
        return Finding("certificate", "warning", f"{host}: {certificate} ends in {left.days} days; renew it")
    return Finding("certificate", "ok", f"{host}: {certificate} is good for {left.days} days")


def _database(options: Any) -> Iterator[Finding]:
    from tidings.kit.database_url import database_url

    url = database_url(options)
    where = str(url.path) if url.backend == "sqlite" else ", ".join(f"{host}:{port}" for host, port in url.hosts)
    if url.backend == "sqlite" and url.path is not None and not url.path.exists():
        yield Finding("database", "ok", f"{where} will be made")
        return

    problem, flushing = asyncio.run(_ask_database(url))
    if problem:
        yield Finding(
            "database", "error", f"{where} does not answer ({problem}); check --user-db-uri, and that it runs"
        )
        return
    yield Finding("database", "ok", f"{where} answers")
    if flushing not in ("", "1"):
        yield Finding(
            "database",
            "warning",
            f"{where} has innodb_flush_log_at_trx_commit={flushing}: a power failure costs messages of the last "
            "second that were acknowledged; set innodb_flush_log_at_trx_commit=1 in the database server's "
            "configuration, and say `set global innodb_flush_log_at_trx_commit = 1`",
        )


async def _ask_database(url: Any) -> tuple[str, str]:
    """What is wrong with the database, '' for nothing; and when InnoDB writes to disk, '' where it is not InnoDB."""
    import sqlalchemy as sa

    from tidings.kit.db import Database, DatabaseAway

    database = Database(url)
    await database.start()
    try:
        await database.ping()
        if database.sqlite:
            return "", ""
        async with database.read() as connection:
            query = sa.text("show global variables like 'innodb_flush_log_at_trx_commit'")
            found = (await connection.execute(query)).first()
        return "", str(found[1]) if found else ""
    except DatabaseAway as error:
        return str(error), ""
    except Exception as error:
        return str(getattr(error, "orig", error)), ""
    finally:
        await database.stop()
