"""The certificates that clients are shown: one for each virtual host, picked by SNI (RFC 6066)."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tidings.kit.options import Options
from tidings.kit.pki import certificate_files, certificate_hash, self_made_certificate
from tidings.xmpp.jid import Jid, JidError

# XEP-0368 4: what a client asks for by ALPN on the TLS port.
ALPN = "xmpp-client"


class CertificateProblem(Exception):
    """A certificate that can't be used; the text says which file and why."""


@dataclass(frozen=True, slots=True)
class HostCertificate:
    """What is shown for one virtual host."""

    context: ssl.SSLContext
    certificate_file: Path
    # RFC 5929 tls-server-end-point.
    server_end_point: bytes


class Certificates:
    """Finds the certificate for each virtual host, and makes TLS contexts that pick by server name.

    For a host: `--tls-cert-file[host]` and `--tls-key-file[host]`; else `HOST.crt` and `HOST.key`, or
    `HOST/fullchain.pem` and `HOST/privkey.pem`, in `--certs-dir`; else the self-made one in the data folder.
    """

    def __init__(self, hosts: Sequence[str], options: Options) -> None:
        self._hosts = tuple(hosts)
        self._options = options
        self._by_host: dict[str, HostCertificate] = {}
        # Which hosts have no certificate but the self-made one.
        self.self_made: list[str] = []

    def load(self) -> None:
        """Reads all certificates. Raises CertificateProblem."""
        fallback: tuple[Path, Path] | None = None
        for host in self._hosts:
            files = self._files(host)
            if files is None:
                if fallback is None:
                    fallback = self_made_certificate(Path(self._options["data-dir"]), list(self._hosts))
                self.self_made.append(host)
                files = fallback
            self._by_host[host] = _load(host, *files)
            self._by_host[host].context.sni_callback = self._by_server_name

    def _files(self, host: str) -> tuple[Path, Path] | None:
        certificate = self._options.for_host(host, "tls-cert-file")
        key = self._options.for_host(host, "tls-key-file")
        if bool(certificate) != bool(key):
            raise CertificateProblem(
                f"for {host} only one of --tls-cert-file and --tls-key-file is set; set both, or neither"
            )
        if certificate:
            return Path(certificate), Path(key)
        folder = self._options["certs-dir"]
        return certificate_files(Path(folder), host) if folder else None

    def context(self, host: str = "") -> ssl.SSLContext:
        """The context for a new connection.

        `host` is the virtual host that the client named before TLS (STARTTLS). It is shown when the client
        sends no server name; where it named none, the first virtual host is.
        """
        return self._by_host.get(host, self._by_host[self._hosts[0]]).context

    def shown(self, ssl_object: ssl.SSLObject) -> HostCertificate:
        """What the handshake of a connection has shown."""
        for certificate in self._by_host.values():
            if certificate.context is ssl_object.context:
                return certificate
        return self._by_host[self._hosts[0]]

    def _by_server_name(self, ssl_object: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        if not name:
            return
        try:
            certificate = self._by_host.get(Jid.parse(name).domain)
        except JidError:
            return  # the first host's certificate will not match, and the client will say so
        if certificate is not None:
            ssl_object.context = certificate.context


def _load(host: str, certificate: Path, key: Path) -> HostCertificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # RFC 7590 3.1 and 3.2: no SSL, no TLS compression; 1.2 is the oldest version still sound (RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols([ALPN])
    try:
        context.load_cert_chain(certificate, key)
        pem = certificate.read_bytes()
    except FileNotFoundError as error:
        raise CertificateProblem(f"the certificate for {host}: there is no file {error.filename}") from error
    except (ssl.SSLError, OSError) as error:
        raise CertificateProblem(
            f"the certificate for {host} ({certificate} with {key}) can't be used: {error}"
        ) from error
    return HostCertificate(context, certificate, certificate_hash(pem))
