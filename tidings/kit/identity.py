"""Who calls on the cluster port (DESIGN 6): what a certificate makes of its owner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509

from tidings.cluster.node import NodeState
from tidings.cluster.view import ClusterView
from tidings.kit.pki import URI_CLIENT, URI_NODE, CertificateAuthority, normalised, uri_names

# What a client's certificate may be limited to; what each opens says `tidings.kit.access`.
SCOPES = frozenset({"accounts", "component", "nodes"})


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller of this process."""

    # "node": a live row's owner; "joiner": may become one; "client": a program with a name; "local": this
    # very process.
    kind: str
    name: str
    # Of a node: what it runs. Of a client: its scopes.
    services: frozenset[str] = frozenset()
    incarnation: str = ""
    # What it showed (PEM); '' for local callers.
    certificate: str = ""
    # Of a node or joiner: the services that its certificate lets it run; none named: any.
    may_run: frozenset[str] = frozenset()


class Identities:
    """Tells callers by their certificates.

    The handshake alone makes nobody somebody: gRPC lets the owner of any accepted certificate sign another
    one. A node is who shows, byte for byte, the certificate of a live row; everybody else must have been
    signed by an authority itself, and is what the URI name says.
    """

    # Certificates seen and judged; more are judged anew.
    CACHED = 1024

    def __init__(self, authorities: Sequence[CertificateAuthority]) -> None:
        self._authorities = authorities
        self._judged: dict[bytes, tuple[str, Caller | None]] = {}

    def identify(self, leaf: bytes, view: ClusterView) -> Caller | None:
        """The caller that shows this certificate (PEM); None for nobody."""
        judged = self._judged.get(leaf)
        if judged is None:
            judged = self._judge(leaf)
            if len(self._judged) >= self.CACHED:
                self._judged.clear()
            self._judged[leaf] = judged
        certificate, by_name = judged
        node = view.by_certificate(certificate)
        if node is not None and node.state is NodeState.FAILED:
            # It may ask to join anew, if an authority of ours has signed for it.
            return by_name
        if node is not None:
            services = frozenset(node.services)
            # A certificate that no authority of ours has signed says no more than its row.
            may_run = by_name.may_run if by_name is not None and by_name.kind == "joiner" else services
            return Caller("node", node.hostname, services, node.incarnation, certificate, may_run)
        return by_name

    def _judge(self, leaf: bytes) -> tuple[str, Caller | None]:
        try:
            certificate = x509.load_pem_x509_certificate(leaf)
        except ValueError:
            return "", None
        text = normalised(leaf)
        if any(authority.signed(certificate) for authority in self._authorities):
            for uri in uri_names(certificate):
                if uri.startswith(URI_CLIENT):
                    name, limited, scopes = uri.removeprefix(URI_CLIENT).partition("/")
                    services = frozenset(scopes.split(",")) if limited else SCOPES
                    return text, Caller("client", name, services, certificate=text)
                if uri.startswith(URI_NODE):
                    name, _, allowed = uri.removeprefix(URI_NODE).partition("/")
                    may_run = frozenset(allowed.split(",")) if allowed else frozenset()
                    return text, Caller("joiner", name, may_run=may_run, certificate=text)
        return text, None
