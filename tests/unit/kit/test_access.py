"""Who may call what on the cluster port (DESIGN 6), line by line; and who is who."""

from __future__ import annotations

import pytest
from cryptography import x509

from tidings.api.component.v1 import component_pb2
from tidings.api.connector.v1 import connector_pb2
from tidings.api.node.v1 import node_pb2
from tidings.api.pubsub.v1 import pubsub_pb2
from tidings.api.registry.v1 import registry_pb2
from tidings.api.router.v1 import account_pb2, router_pb2
from tidings.cluster.node import Node
from tidings.cluster.view import ClusterView
from tidings.kit.access import allowed
from tidings.kit.identity import Caller, Identities
from tidings.kit.pki import (
    CertificateAuthority,
    PkiError,
    certificate_hash,
    machine_secret,
    normalised,
    self_made_certificate,
)

METHODS = [
    f"{service.full_name}/{method.name}"
    for module in (node_pb2, registry_pb2, router_pb2, account_pb2, connector_pb2, component_pb2, pubsub_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
CALLERS = {
    "registry": Caller("node", "n", frozenset({"registry"})),
    "router": Caller("node", "n", frozenset({"router"})),
    "connector": Caller("node", "n", frozenset({"connector"})),
    "pubsub": Caller("node", "n", frozenset({"pubsub"})),
    "joiner": Caller("joiner", "n"),
    "client": Caller("client", "c"),
}
ANY_NODE = {"registry", "router", "connector", "pubsub"}
WHO = {
    "RegistryService/Join": {*ANY_NODE, "joiner"},
    "RegistryService/Beat": ANY_NODE,
    "RegistryService/Leave": ANY_NODE,
    "RegistryService/ListNodes": {*ANY_NODE, "joiner", "client"},
    "RegistryService/WatchNodes": {*ANY_NODE, "joiner", "client"},
    "RegistryService/ReportUnreachable": ANY_NODE,
    "RegistryService/ProbeNode": {"registry"},
    "RegistryService/DrainNode": {"client"},
    "NodeService/Drain": {"registry"},
    "RouterService/Attach": {"connector"},
    "RouterService/Forward": {"router"},
    "RouterService/AdoptSession": {"router"},
    "RouterService/EndSession": {"router"},
    "AccountService/CreateAccount": {"client"},
    "AccountService/SetPassword": {"client"},
    "AccountService/DeleteAccount": {"client"},
    "AccountService/ListAccounts": {"client"},
    "ConnectorService/ListStreams": {"router", "client"},
    "ConnectorService/CloseStream": {"router", "client"},
    "ComponentService/Attach": {*ANY_NODE, "client"},
    "ComponentService/GetRosterItem": {*ANY_NODE, "client"},
    "PubsubService/GetServiceInfo": {"client"},
}


def test_every_method_has_a_line_here() -> None:
    assert {method.rpartition(".")[2] for method in METHODS} == set(WHO)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("caller", CALLERS)
def test_callers_may_call_what_the_line_says(method: str, caller: str) -> None:
    assert allowed(method, CALLERS[caller]) == (caller in WHO[method.rpartition(".")[2]])


def test_what_has_no_line_is_refused() -> None:
    assert not allowed("tidings.api.future.v1.NewService/Call", CALLERS["client"])


SECRET = "a secret that is long enough"
OURS = CertificateAuthority.from_secret(SECRET)


def row(certificate: bytes) -> ClusterView:
    return ClusterView(1, [Node("n1", "i1", "127.0.0.11", 5777, ("router",), certificate=normalised(certificate))])


def test_all_who_know_the_secret_accept_each_other() -> None:
    leaf = OURS.issue(["tidings:client:backup"], "backup")
    again = CertificateAuthority.from_secret(SECRET)
    assert again.signed(x509.load_pem_x509_certificate(leaf.certificate))
    other = CertificateAuthority.from_secret("another secret, long enough")
    assert not other.signed(x509.load_pem_x509_certificate(leaf.certificate))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(PkiError, match="at least 20 characters"):
        CertificateAuthority.from_secret("short")


def test_a_node_is_who_shows_the_certificate_of_a_row() -> None:
    stranger = CertificateAuthority.from_secret("nobody here knows this one")
    leaf = stranger.issue(["tidings:node:n1"], "n1").certificate
    caller = Identities([OURS]).identify(leaf, row(leaf))
    assert caller is not None
    assert (caller.kind, caller.name, caller.services, caller.incarnation) == ("node", "n1", {"router"}, "i1")


def test_a_row_that_is_gone_makes_nobody_a_node() -> None:
    identities = Identities([OURS])
    stranger = CertificateAuthority.from_secret("nobody here knows this one")
    leaf = stranger.issue(["tidings:node:n1"], "n1").certificate
    assert identities.identify(leaf, row(leaf)) is not None
    assert identities.identify(leaf, ClusterView(2)) is None


def test_others_are_what_their_uri_name_says_when_an_authority_signed_it() -> None:
    identities = Identities([OURS])
    view = ClusterView()
    client = identities.identify(OURS.issue(["tidings:client:backup"], "x").certificate, view)
    joiner = identities.identify(OURS.issue(["tidings:node:c1/connector"], "x").certificate, view)
    assert client is not None
    assert (client.kind, client.name) == ("client", "backup")
    assert joiner is not None
    assert (joiner.kind, joiner.name, joiner.services) == ("joiner", "c1", {"connector"})
    assert identities.identify(OURS.issue(["https://example.org"], "x").certificate, view) is None


def test_a_leaf_that_a_row_s_owner_signs_makes_nobody_somebody() -> None:
    """gRPC lets the owner of an accepted certificate sign another one; we do not."""
    from cryptography.hazmat.primitives import serialization

    own = OURS.issue(["tidings:node:n1"], "n1")
    key = serialization.load_pem_private_key(own.private_key, None)
    forger = CertificateAuthority(x509.load_pem_x509_certificate(own.certificate), key)  # type: ignore[arg-type]
    forged = forger.issue(["tidings:client:admin"], "admin").certificate
    assert Identities([OURS]).identify(forged, row(own.certificate)) is None


def test_the_secret_of_a_machine_is_made_once_and_kept_private(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: machine_secret(tmp_path), range(32)))
    assert len(secrets) == 1
    assert (tmp_path / "cluster-secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "cluster-secret").chmod(0o644)
    with pytest.raises(PkiError, match="chmod 600"):
        machine_secret(tmp_path)


def test_the_self_made_certificate_is_kept_until_the_hosts_change(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first, _ = self_made_certificate(tmp_path, ["example.org", "b\u00fccher.example"])
    assert self_made_certificate(tmp_path, ["example.org", "b\u00fccher.example"])[0] == first
    assert self_made_certificate(tmp_path, ["example.net"])[0] != first
    names = x509.load_pem_x509_certificate(first.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["example.org", "xn--bcher-kva.example"]
    assert len(certificate_hash(first.read_bytes())) == 32
