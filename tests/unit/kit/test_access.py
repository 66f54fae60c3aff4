"""Who may call what on the cluster port (DESIGN 6), line by line; and who is who."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from tidings.api.component.v1 import component_pb2
from tidings.api.connector.v1 import connector_pb2
from tidings.api.node.v1 import node_pb2
from tidings.api.pubsub.v1 import pubsub_pb2
from tidings.api.registry.v1 import registry_pb2
from tidings.api.router.v1 import account_pb2, router_pb2
from tidings.cluster.node import Node
from tidings.cluster.view import ClusterView
from tidings.kit.access import ACCESS, allowed
from tidings.kit.identity import SCOPES, Caller, Identities
from tidings.kit.pki import (
    NODE_DNS_NAME,
    REGISTRY_DNS_NAME,
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
    "client": Caller("client", "c", SCOPES),
    **{f"client/{scope}": Caller("client", "c", frozenset({scope})) for scope in sorted(SCOPES)},
}
ANY_NODE = {"registry", "router", "connector", "pubsub"}
ANY_CLIENT = {"client", *(f"client/{scope}" for scope in SCOPES)}
WHO = {
    "RegistryService/Join": {*ANY_NODE, "joiner"},
    "RegistryService/Beat": {*ANY_NODE, "joiner"},
    "RegistryService/Leave": {*ANY_NODE, "joiner"},
    "RegistryService/ListNodes": {*ANY_NODE, "joiner", *ANY_CLIENT},
    "RegistryService/WatchNodes": {*ANY_NODE, "joiner", *ANY_CLIENT},
    "RegistryService/ReportUnreachable": ANY_NODE,
    "RegistryService/CheckReached": ANY_NODE,
    "RegistryService/DrainNode": {"client", "client/nodes"},
    "NodeService/Drain": {"registry"},
    "NodeService/Probe": {"registry"},
    "RouterService/Attach": {"connector"},
    "RouterService/Forward": {"router"},
    "RouterService/AdoptSession": {"router"},
    "RouterService/EndSession": {"router"},
    "AccountService/CreateAccount": {"client", "client/accounts"},
    "AccountService/SetPassword": {"client", "client/accounts"},
    "AccountService/DeleteAccount": {"client", "client/accounts"},
    "AccountService/ListAccounts": {"client", "client/accounts"},
    "ConnectorService/ListStreams": {"router", "client", "client/nodes"},
    "ConnectorService/CloseStream": {"router", "client", "client/nodes"},
    "ComponentService/Attach": {*ANY_NODE, "client", "client/component"},
    "ComponentService/GetRosterItem": {*ANY_NODE, "client", "client/component"},
    "PubsubService/GetServiceInfo": ANY_CLIENT,
}


def test_every_method_has_a_line_here() -> None:
    assert {method.rpartition(".")[2] for method in METHODS} == set(WHO)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("caller", CALLERS)
def test_callers_may_call_what_the_line_says(method: str, caller: str) -> None:
    assert allowed(method, CALLERS[caller]) == (caller in WHO[method.rpartition(".")[2]])


def test_what_has_no_line_is_refused() -> None:
    assert not allowed("tidings.api.future.v1.NewService/Call", CALLERS["client"])


def test_what_a_client_may_be_limited_to_stands_in_the_table() -> None:
    entries = {entry for entries in ACCESS.values() for entry in entries}
    assert {entry.removeprefix("client:") for entry in entries if entry.startswith("client:")} == SCOPES


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
    assert (client.kind, client.name, client.services) == ("client", "backup", SCOPES)
    assert joiner is not None
    assert (joiner.kind, joiner.name, joiner.may_run) == ("joiner", "c1", {"connector"})
    assert identities.identify(OURS.issue(["https://example.org"], "x").certificate, view) is None


@pytest.mark.parametrize(
    ("uri", "scopes"),
    [
        ("tidings:client:weather/component", {"component"}),
        ("tidings:client:weather/accounts,nodes", {"accounts", "nodes"}),
        ("tidings:client:weather/", {""}),
    ],
)
def test_a_client_has_the_scopes_behind_the_slash_alone(uri: str, scopes: set[str]) -> None:
    caller = Identities([OURS]).identify(OURS.issue([uri], "x").certificate, ClusterView())
    assert caller is not None
    assert (caller.kind, caller.name, caller.services) == ("client", "weather", scopes)


@pytest.mark.parametrize(
    ("uri", "signer", "may_run"),
    [
        ("tidings:node:n1/router,pubsub", OURS, {"router", "pubsub"}),
        ("tidings:node:n1", OURS, set()),
        # Nobody here knows who has signed it: it says no more than its row.
        ("tidings:node:n1", CertificateAuthority.from_secret("nobody here knows this one"), {"router"}),
    ],
)
def test_a_node_keeps_to_what_its_certificate_lets_it_run(
    uri: str, signer: CertificateAuthority, may_run: set[str]
) -> None:
    leaf = signer.issue([uri], "n1").certificate
    caller = Identities([OURS]).identify(leaf, row(leaf))
    assert caller is not None
    assert (caller.kind, caller.services, caller.may_run) == ("node", {"router"}, may_run)


@pytest.mark.parametrize(
    ("uri", "answers_to"),
    [
        ("tidings:node:n1", [NODE_DNS_NAME, REGISTRY_DNS_NAME]),
        ("tidings:node:n1/registry,router", [NODE_DNS_NAME, REGISTRY_DNS_NAME]),
        ("tidings:node:c1/connector", [NODE_DNS_NAME]),
        ("tidings:client:weather", []),
    ],
)
def test_only_what_may_run_a_registry_answers_to_its_name_and_a_client_to_none(
    uri: str, answers_to: list[str]
) -> None:
    leaf = x509.load_pem_x509_certificate(OURS.issue([uri], "x").certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == answers_to
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert (ExtendedKeyUsageOID.SERVER_AUTH in purposes) == bool(answers_to)
    assert ExtendedKeyUsageOID.CLIENT_AUTH in purposes


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
