"""Real clients: slixmpp over TLS; and -PLUS by a raw client, for no library of ours speaks it."""

from __future__ import annotations

import asyncio
import base64
import secrets
import ssl
from pathlib import Path
from typing import Any

import pytest
import slixmpp
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from scramp import ScramClient

from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.kit.pki import self_made_certificate
from tidings.testing.client import RawClient
from tidings.testing.server import Installation
from tidings.xmpp import ns

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Slix(slixmpp.ClientXMPP):
    def __init__(self, jid: str, installation: Installation) -> None:
        super().__init__(jid, "secret")
        self.ssl_context.check_hostname = False
        self.ssl_context.verify_mode = ssl.CERT_NONE
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.presences: asyncio.Queue[Any] = asyncio.Queue()
        self.ready = asyncio.Event()
        self._at = (installation.address, installation.port)
        self.add_event_handler("session_start", self._started)
        self.add_event_handler("message", self.messages.put_nowait)
        self.add_event_handler("presence_available", self.presences.put_nowait)
        self.add_event_handler("presence_unavailable", self.presences.put_nowait)

    async def _started(self, _event: Any) -> None:
        self.send_presence()
        await self.get_roster()
        self.ready.set()

    async def enter(self) -> None:
        self.connect(*self._at)
        await asyncio.wait_for(self.ready.wait(), 20)

    async def message(self) -> tuple[str, str]:
        message = await asyncio.wait_for(self.messages.get(), 10)
        return str(message["from"]), message["body"]

    async def sees(self, bare: str, type_: str) -> None:
        """Waits for presence of this type from an account; slixmpp subscribes back, so there is more on the way."""
        while True:
            presence = await asyncio.wait_for(self.presences.get(), 10)
            if presence["from"].bare == bare and presence["type"] == type_:
                return


async def test_two_slixmpp_clients_add_each_other_and_chat(installation: Installation) -> None:
    names = [f"slix-{secrets.token_hex(3)}@localhost" for _ in range(2)]
    await installation.add_accounts(*names)
    alice, bob = (Slix(f"{name}/r", installation) for name in names)
    await asyncio.gather(alice.enter(), bob.enter())
    alice.send_message(names[1], "hello", mtype="chat")
    assert await bob.message() == (f"{names[0]}/r", "hello")
    bob.send_message(f"{names[0]}/r", "hello yourself", mtype="chat")
    assert await alice.message() == (f"{names[1]}/r", "hello yourself")
    alice.send_presence_subscription(names[1])
    await alice.sees(names[1], "available")
    assert alice.client_roster[names[1]]["subscription"] in ("to", "both")
    await bob.disconnect()
    await alice.sees(names[1], "unavailable")
    alice.send_message(names[1], "for later", mtype="chat")
    again = Slix(f"{names[1]}/other", installation)
    await again.enter()
    assert await again.message() == (f"{names[0]}/r", "for later")
    await alice.disconnect()
    await again.disconnect()


def scram(mechanism: str, name: str, binding: tuple[str, bytes] | None, authzid: str = "") -> ScramClient:
    return ScramClient([mechanism], name, "secret", channel_binding=binding)


@pytest.mark.parametrize("hash_name", ["SHA-1", "SHA-256", "SHA-512"])
@pytest.mark.parametrize("plus", ["", "-PLUS"])
@pytest.mark.parametrize("direct", [False, True], ids=["starttls", "direct-tls"])
async def test_scram(installation: Installation, hash_name: str, plus: str, direct: bool) -> None:
    """RFC 5802, RFC 7677; -PLUS with tls-server-end-point (RFC 5929 4)."""
    name = await an_account(installation)
    client = await encrypted(installation, direct)
    binding = ("tls-server-end-point", end_point(client)) if plus else None
    exchange = scram(f"SCRAM-{hash_name}{plus}", name, binding)
    success = await run_scram(client, exchange, f"SCRAM-{hash_name}{plus}")
    assert success.tag == f"{{{ns.SASL}}}success"
    exchange.set_server_final(base64.b64decode(success.text).decode())
    assert (await client.open()).find(f"{{{ns.BIND}}}bind") is not None
    await client.close()


async def test_scram_with_a_wrong_certificate_hash_is_refused(installation: Installation) -> None:
    """RFC 5802 6: somebody in between, who shows another certificate, is found out."""
    name = await an_account(installation)
    client = await encrypted(installation, False)
    exchange = scram("SCRAM-SHA-256-PLUS", name, ("tls-server-end-point", b"x" * 32))
    assert (await run_scram(client, exchange, "SCRAM-SHA-256-PLUS")).tag == f"{{{ns.SASL}}}failure"
    await client.close()


async def test_own_bare_jid_is_allowed_as_authorisation_identity(installation: Installation) -> None:
    """RFC 6120 6.3.8, RFC 5802 7: the GS2 header with the identity is part of what is signed."""
    name = await an_account(installation)
    for authzid, expected in ((f"{name}@localhost", "success"), ("admin@localhost", "failure")):
        client = await encrypted(installation, False)
        exchange = scram("SCRAM-SHA-256", name, None)
        header = f"n,a={authzid},"

        class Header:
            def make_cbind_input(self, _binding: Any, text: str = header) -> bytes:
                return text.encode()

        first = exchange.get_client_first()
        assert first.startswith("n,,")
        exchange.gs2_header = Header()
        answer = await run_scram(client, exchange, "SCRAM-SHA-256", header + first.removeprefix("n,,"))
        assert answer.tag == f"{{{ns.SASL}}}{expected}"
        await client.close()


async def test_channel_binding_is_announced_under_tls(installation: Installation) -> None:
    """XEP-0440 3."""
    client = RawClient(installation.address, installation.tls_port, "localhost")
    await client.connect(tls=True)
    features = await client.open()
    types = features.findall(f"{{{ns.SASL_CB}}}sasl-channel-binding/{{{ns.SASL_CB}}}channel-binding")
    assert [one.get("type") for one in types] == ["tls-server-end-point"]
    mechanisms = [one.text for one in features.iter(f"{{{ns.SASL}}}mechanism")]
    assert mechanisms[:3] == ["SCRAM-SHA-512-PLUS", "SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"]
    await client.close()


async def test_ipv6_works_wherever_ipv4_does(tmp_path: Path) -> None:
    both = Installation("in-process", tmp_path, ["--bind-address=127.0.0.1,::1"])
    both.start()
    try:
        await both.add_account("six@localhost")
        for port, tls in ((both.port, False), (both.tls_port, True)):
            client = RawClient("::1", port, "localhost")
            await client.log_in("six", "secret", tls=tls)
            assert await client.ping() == []
            await client.close()
        channel = both.dial("::1")
        stub: Any = RegistryServiceStub(channel)
        assert len((await stub.ListNodes(ListNodesRequest(), timeout=10)).nodes) == 1
        await channel.close()
    finally:
        assert both.stop() == {"all": 0}


async def test_each_virtual_host_shows_its_own_certificate(tmp_path: Path) -> None:
    """RFC 6066 3 (SNI) under direct TLS; the header's host under STARTTLS."""
    for host in ("localhost", "example.net"):
        folder = tmp_path / host
        folder.mkdir()
        made, _ = self_made_certificate(folder, [host])
        for ending in ("crt", "key"):
            (tmp_path / f"{host}.{ending}").write_bytes(made.read_bytes())
    own = Installation("in-process", tmp_path, [f"--certs-dir={tmp_path}"])
    own.start()
    try:
        for host in ("localhost", "example.net"):
            for port, direct in ((own.port, False), (own.tls_port, True)):
                client = RawClient(own.address, port, host)
                await client.connect(tls=direct)
                await (client.open() if direct else client.encrypt())
                shown = client._writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                names = x509.load_der_x509_certificate(shown).extensions
                names_ = names.get_extension_for_class(x509.SubjectAlternativeName).value
                assert names_.get_values_for_type(x509.DNSName) == [host]
                await client.close()
    finally:
        assert own.stop() == {"all": 0}


async def test_clients_make_accounts_where_that_is_allowed(tmp_path: Path) -> None:
    """XEP-0077 3.1, on a stream that nobody is authenticated on; one virtual host allows it, the other does not."""
    open_ = Installation("in-process", tmp_path, ["--registration[example.net]=true"])
    open_.start()

    async def ask(host: str, type_: str, body: str) -> Any:
        client = RawClient(open_.address, open_.tls_port, host)
        await client.connect(tls=True)
        features = await client.open()
        offered = features.find("{http://jabber.org/features/iq-register}register") is not None
        assert offered == (host == "example.net")
        await client.send(
            f"<iq type='{type_}' id='1' to='{host}'><query xmlns='jabber:iq:register'>{body}</query></iq>"
        )
        answer = await client.element()
        await client.close()
        return answer

    try:
        new = "<username>Romeo</username><password>secret</password>"
        assert (await ask("example.net", "get", "")).find(".//{jabber:iq:register}username") is not None
        assert (await ask("example.net", "set", new)).get("type") == "result"
        conflict = await ask("example.net", "set", new)
        assert conflict[0][0].tag.endswith("conflict")
        assert (await ask("localhost", "set", new))[0][0].tag.endswith("not-allowed")
        bad = "<username>a b</username><password>x</password>"
        assert (await ask("example.net", "set", bad))[0][0].tag.endswith("not-acceptable")
        client = RawClient(open_.address, open_.port, "example.net")
        await client.log_in("romeo", "secret")
        await client.send(
            "<iq type='set' id='2'><query xmlns='jabber:iq:register'><username>romeo</username><password>new</password></query></iq>"
        )
        assert (await client.element()).get("type") == "result"
        await client.close()
        again = RawClient(open_.address, open_.port, "example.net")
        await again.log_in("romeo", "new")
        await again.close()
    finally:
        assert open_.stop() == {"all": 0}


async def an_account(installation: Installation) -> str:
    name = f"scram-{secrets.token_hex(4)}"
    await installation.add_account(f"{name}@localhost")
    return name


async def encrypted(installation: Installation, direct: bool) -> RawClient:
    client = RawClient(installation.address, installation.tls_port if direct else installation.port, "localhost")
    await client.connect(tls=direct)
    await (client.open() if direct else client.encrypt())
    return client


def end_point(client: RawClient) -> bytes:
    certificate = client._writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(certificate).fingerprint(hashes.SHA256())


async def run_scram(client: RawClient, exchange: ScramClient, mechanism: str, first: str = "") -> Any:
    data = base64.b64encode((first or exchange.get_client_first()).encode()).decode()
    await client.send(f"<auth xmlns='{ns.SASL}' mechanism='{mechanism}'>{data}</auth>")
    challenge = await client.element()
    if challenge.tag != f"{{{ns.SASL}}}challenge":
        return challenge
    exchange.set_server_first(base64.b64decode(challenge.text).decode())
    final = base64.b64encode(exchange.get_client_final().encode()).decode()
    await client.send(f"<response xmlns='{ns.SASL}'>{final}</response>")
    return await client.element()
