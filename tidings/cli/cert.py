"""`tidings cert`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from tidings.cli.app import OK, PASS_ON, Failed, load_options, paragraph

CA = "cluster-ca"


@click.group()
def cert() -> None:
    """Make certificates for other programs, and a small authority for a cluster.

    \b
    Examples:
      tidings cert client backup
      tidings cert client weather component
      tidings cert ca --out=ca
      tidings cert node c1.example.org connector --ca=ca
    """


@cert.command(context_settings=PASS_ON)
@click.option("--out", default=".", help="The folder to write to.")
@click.option("--ca", default="", help="The folder of `tidings cert ca`, to sign with that authority.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def client(arguments: tuple[str, ...], out: str, ca: str) -> int:
    """Write NAME.crt, NAME.key and ca.crt, with which a program may call the cluster's API under that name.

    Behind the name stands what it may do beside listing and watching nodes: "accounts" (add, change and remove
    them), "nodes" (drain them, close their streams), "component" (register what --component-allow[NAME] lets
    it). Without any of these it may do all three: it is an administrator.

    It is signed with --cluster-secret, or else with the secret in --data-dir. A program trusts ca.crt, and takes
    "registry.tidings.invalid" for the server's name (in gRPC: grpc.ssl_target_name_override).

    \b
    Examples:
      tidings cert client backup
      tidings cert client weather component
    """
    from tidings.cli.client import client_uri, keys
    from tidings.kit.identity import SCOPES

    options, words = load_options(arguments)
    name, scopes = (words[0] if words else ""), words[1:]
    if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
        raise Failed("name a program, by letters, digits, - and _: tidings cert client backup")
    for scope in scopes:
        if scope not in SCOPES:
            raise Failed(f"{scope!r} is nothing that a program may do; there are {', '.join(sorted(SCOPES))}")
    if ca:
        authority = _authority(ca)
        pair, roots = authority.issue([client_uri(name, scopes)], name), authority.pem
    else:
        pair, roots = keys(options, name, scopes)
    _write(out, {f"{name}.crt": pair.certificate, f"{name}.key": pair.private_key, "ca.crt": roots})
    return OK


@cert.command()
@click.option("--out", default=".", help="The folder to write to.")
def ca(out: str) -> int:
    """Make an authority for a cluster.

    cluster-ca.crt is for --cluster-tls-ca-file on each node; cluster-ca.key stays with you, and signs with
    `tidings cert node` and `tidings cert client`.

    Example: tidings cert ca --out=ca
    """
    from tidings.kit.pki import CertificateAuthority

    folder = Path(out)
    if (folder / f"{CA}.key").exists():
        raise Failed(f"{folder / CA}.key is there already; it is not overwritten, for its leaves would be worthless")
    authority = CertificateAuthority.new("Tidings cluster authority")
    _write(out, {f"{CA}.crt": authority.pem, f"{CA}.key": authority.key_pem()})
    return OK


@cert.command(context_settings=PASS_ON)
@click.option("--out", default=".", help="The folder to write to.")
@click.option("--ca", default=".", help="The folder of `tidings cert ca`.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def node(arguments: tuple[str, ...], out: str, ca: str) -> int:
    """Write NAME.crt and NAME.key for a node of that --cluster-hostname, which may run the named services only.

    They are for --cluster-tls-cert-file and --cluster-tls-key-file. Without services it may run any.
    Example: tidings cert node c1.example.org connector --ca=ca
    """
    from tidings.kit.pki import URI_NODE

    if not arguments:
        raise Failed("name the node, and the services that it may run: tidings cert node c1.example.org connector")
    name, services = arguments[0], arguments[1:]
    uri = f"{URI_NODE}{name}" + (f"/{','.join(services)}" if services else "")
    pair = _authority(ca).issue([uri], name)
    _write(out, {f"{name}.crt": pair.certificate, f"{name}.key": pair.private_key})
    return OK


def _authority(folder: str) -> Any:
    from tidings.kit.pki import CertificateAuthority

    return CertificateAuthority.from_files(Path(folder) / f"{CA}.crt", Path(folder) / f"{CA}.key")


def _write(out: str, files: dict[str, bytes]) -> None:
    """Writes files, keys so that only their owner reads them: what is there already is replaced as a whole, for
    others may have it open."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{file}-")
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            os.fchmod(descriptor, 0o600 if file.endswith(".key") else 0o644)
        os.replace(temporary, folder / file)
    paragraph(f"{', '.join(str(folder / file) for file in files)}: written.", "green")
