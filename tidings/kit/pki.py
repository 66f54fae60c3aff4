"""Keys and certificates: of the cluster port, and the one that a new installation shows its clients.

All certificates of the cluster port are valid from 2000 to 2099: no clock matters there. What ends their
life is the row in `cluster_nodes`, or the secret that their authority is made from.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import idna
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The DNS names that leaves carry beside their URI, for gRPC checks no URIs: one for each node, which counts where
# that node's certificate is known, and one for those that may run a registry, which counts where only an authority
# is known. A client's leaf has neither: it answers nobody.
NODE_DNS_NAME = "node.tidings.invalid"
REGISTRY_DNS_NAME = "registry.tidings.invalid"
URI_NODE = "tidings:node:"
URI_CLIENT = "tidings:client:"

# Shorter secrets can be guessed from a certificate that somebody saw.
MIN_SECRET = 20

_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_TO = datetime.datetime(2099, 12, 31, tzinfo=datetime.UTC)
_CURVE = ec.SECP256R1()
# The order of P-256, for a private key from derived bytes.
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SCRYPT = {"n": 1 << 15, "r": 8, "p": 1, "maxmem": 64 * 1024 * 1024}


class PkiError(Exception):
    """A secret or certificate that can't be used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its key, PEM."""

    certificate: bytes
    private_key: bytes

    def __repr__(self) -> str:
        return "KeyPair(…)"


class CertificateAuthority:
    """Signs leaves. Every instance made from the same secret accepts the leaves of all others."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey | None) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def from_secret(cls, secret: str) -> CertificateAuthority:
        """scrypt, a P-256 key, a certificate. Raises PkiError for a secret that is too short."""
        if len(secret) < MIN_SECRET:
            raise PkiError(
                f"a cluster secret has at least {MIN_SECRET} characters; make one with `openssl rand -base64 32`"
            )
        derived = hashlib.scrypt(secret.encode(), salt=b"tidings cluster authority v1", dklen=48, **_SCRYPT)
        key = ec.derive_private_key(int.from_bytes(derived, "big") % (_ORDER - 1) + 1, _CURVE)
        # A name for each: TLS looks for a leaf's issuer by its name, and takes the first that it finds.
        number = hashlib.sha256(
            key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        ).hexdigest()[:16]
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Tidings cluster {number}")])
        certificate = _builder(name, name, key.public_key(), serial=1, authority=True).sign(key, hashes.SHA256())
        return cls(certificate, key)

    @classmethod
    def from_file(cls, path: Path) -> CertificateAuthority:
        """An authority whose leaves are accepted; it signs nothing here. Raises PkiError."""
        try:
            return cls(x509.load_pem_x509_certificate(path.read_bytes()), None)
        except (OSError, ValueError) as error:
            raise PkiError(f"{path} can't be used as a certificate authority: {error}") from error

    @classmethod
    def new(cls, name: str) -> CertificateAuthority:
        """An authority with a new key, to be kept in files."""
        key = ec.generate_private_key(_CURVE)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        certificate = _builder(subject, subject, key.public_key(), authority=True).sign(key, hashes.SHA256())
        return cls(certificate, key)

    @classmethod
    def from_files(cls, certificate: Path, key: Path) -> CertificateAuthority:
        """An authority that can sign. Raises PkiError."""
        try:
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise PkiError(f"{key} can't be used as the key of a certificate authority: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise PkiError(f"{key} is no key on an elliptic curve; `tidings cert ca` makes one")
        return cls(cls.from_file(certificate)._certificate, loaded)

    def key_pem(self) -> bytes:
        """Its private key. Raises PkiError when it is known by its certificate alone."""
        if self._key is None:
            raise PkiError("this authority is known by its certificate alone")
        return _private_pem(self._key)

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, uri_names: Sequence[str], common_name: str) -> KeyPair:
        """A leaf with a new key, under these URI names. It serves only as what they say."""
        if self._key is None:
            raise PkiError("this authority is known by its certificate alone and signs nothing")
        key = ec.generate_private_key(_CURVE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
        answers_to = [x509.DNSName(dns_name) for dns_name in _dns_names(uri_names)]
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if answers_to else [])]
        builder = (
            _builder(self._certificate.subject, name, key.public_key())
            .add_extension(
                x509.SubjectAlternativeName([*map(x509.UniformResourceIdentifier, uri_names), *answers_to]),
                critical=False,
            )
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        return KeyPair(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            _private_pem(key),
        )

    def signed(self, leaf: x509.Certificate) -> bool:
        """Whether this authority signed the leaf itself: gRPC would also take a longer chain."""
        try:
            leaf.verify_directly_issued_by(self._certificate)
        except (InvalidSignature, ValueError, TypeError):
            return False
        return True


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    serial: int = 0,
    authority: bool = False,
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=authority, crl_sign=authority, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_TO)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
    )


def _dns_names(uri_names: Sequence[str]) -> list[str]:
    """What a leaf with these URI names answers to."""
    found: list[str] = []
    for uri in uri_names:
        if uri.startswith(URI_NODE):
            services = uri.partition("/")[2]
            may_be_registry = not services or "registry" in services.split(",")
            found += [NODE_DNS_NAME, *([REGISTRY_DNS_NAME] if may_be_registry else [])]
    return found


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def uri_names(leaf: x509.Certificate) -> list[str]:
    """The URI names of a certificate."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return list(names.get_values_for_type(x509.UniformResourceIdentifier))


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate, as hexadecimal: a name for it, no secret."""
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


def normalised(pem: bytes) -> str:
    """A certificate in the one form in which it is compared."""
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.PEM).decode()


def machine_secret(data_dir: Path) -> str:
    """The secret of the processes that share a data folder; made by whichever comes first.

    Raises PkiError when others could read it.
    """
    path = data_dir / "cluster-secret"
    _write_once(path, (secrets.token_urlsafe(48) + "\n").encode())
    mode = path.stat().st_mode
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PkiError(f"{path} can be read by others; say `chmod 600 {path}`")
    return path.read_text().strip()


def self_made_certificate(data_dir: Path, hosts: Sequence[str]) -> tuple[Path, Path]:
    """A certificate for XMPP clients of these virtual hosts, signed by itself; made once and kept.

    Returns the files of certificate and key. Remade when the hosts change.
    """
    names = [_ascii(host) for host in hosts]
    tag = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    both = data_dir / f"self-made-{tag}.pem"
    if not both.exists():
        key = ec.generate_private_key(_CURVE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .issuer_name(name)
            .subject_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=3650))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        # One file for both, so that no start finds half of it.
        _write_once(both, certificate.public_bytes(serialization.Encoding.PEM) + _private_pem(key))
    return both, both


def certificate_files(folder: Path, host: str) -> tuple[Path, Path] | None:
    """A virtual host's certificate and key in a folder of such; None when it has none."""
    # The last one is Tigase's: certificate and key in one file.
    for names in (
        (f"{host}.crt", f"{host}.key"),
        (f"{host}/fullchain.pem", f"{host}/privkey.pem"),
        (f"{host}.pem",) * 2,
    ):
        files = folder / names[0], folder / names[1]
        if files[0].exists() and files[1].exists():
            return files
    return None


def certificate_hash(pem: bytes) -> bytes:
    """RFC 5929 4.1, tls-server-end-point: the certificate's hash by its signature's hash function."""
    certificate = x509.load_pem_x509_certificate(pem)
    algorithm = certificate.signature_hash_algorithm
    if algorithm is None or isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    return certificate.fingerprint(algorithm)


def _ascii(host: str) -> str:
    return host if host.startswith("[") else idna.encode(host, uts46=True).decode()


def _write_once(path: Path, content: bytes) -> None:
    """Makes a file that only its owner reads, whole or not at all; a file that is there stays."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process was first, and its content counts
    finally:
        os.unlink(temporary)
