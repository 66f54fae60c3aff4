"""What breaks a rule gets the RFC's answer; the process lives, and nothing of it reaches another user."""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass

import pytest
from lxml import etree

from tidings.testing.client import Closed, RawClient, header
from tidings.testing.server import Installation
from tidings.xmpp import ns

HOST = "localhost"
OPEN = header(HOST)
BIND = f"<iq type='set' id='1'><bind xmlns='{ns.BIND}'/></iq>"
STANZA_ERRORS = f"{{{ns.STANZA_ERRORS}}}"


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def auth(mechanism: str, data: str) -> str:
    return f"<auth xmlns='{ns.SASL}' mechanism='{mechanism}'>{data}</auth>"


@dataclass(frozen=True)
class Row:
    """One violation: where the stream stands, what is sent, and what must come of it."""

    name: str
    clause: str
    # plain: nothing sent yet. open: header answered, no TLS. tls: header answered, TLS. authenticated: header
    # answered behind SASL. bound: a session.
    at: str
    sent: str | bytes
    # A stream error's condition; or "sasl:", "stanza:", "tls:" and a condition; or "nothing": it is ignored.
    answer: str


ROWS = [
    # --- streams (RFC 6120 4) ---
    Row("no XML at all", "4.9.3.13", "plain", "GET / HTTP/1.1\r\n\r\n", "not-well-formed"),
    Row("another root element", "4.9.3.1", "plain", "<hello xmlns='jabber:client'/>", "bad-format"),
    Row("another namespace for the stream", "4.9.3.10", "plain", OPEN.replace(ns.STREAMS, "urn:example:streams"), "invalid-namespace"),
    Row("a server's content namespace", "4.8.2", "plain", OPEN.replace(ns.CLIENT, ns.SERVER), "invalid-namespace"),
    Row("no content namespace", "4.8.2", "plain", OPEN.replace(f"xmlns='{ns.CLIENT}' ", ""), "invalid-namespace"),
    Row("an unknown host", "4.9.3.6", "plain", header("elsewhere.example"), "host-unknown"),
    Row("no host", "4.7.2", "plain", OPEN.replace(f" to='{HOST}'", ""), "improper-addressing"),
    Row("no version", "4.7.5", "plain", OPEN.replace(" version='1.0' to", " to"), "unsupported-version"),
    Row("an old version", "4.9.3.25", "plain", OPEN.replace("version='1.0'", "version='0.9'"), "unsupported-version"),
    Row("a version that is no number", "4.9.3.25", "plain", OPEN.replace("version='1.0'", "version='new'"), "unsupported-version"),
    Row("another encoding", "11.6", "plain", OPEN.replace("<?xml version='1.0'?>", "<?xml version='1.0' encoding='ISO-8859-1'?>"), "unsupported-encoding"),
    Row("bytes that are not UTF-8", "4.9.3.22", "plain", OPEN.encode() + b"<a>\xff\xfe</a>", "unsupported-encoding"),
    Row("a DTD with an entity", "11.1", "plain", "<!DOCTYPE a [<!ENTITY x 'y'>]>", "restricted-xml"),
    Row("a billion laughs", "11.1", "plain", "<!DOCTYPE l [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;'>]><l>&b;</l>", "restricted-xml"),
    Row("a comment", "11.1", "open", "<!-- hello -->", "restricted-xml"),
    Row("a processing instruction", "11.1", "open", "<?php echo 1 ?>", "restricted-xml"),
    Row("an entity that XML does not define", "11.1", "open", "<message><body>&nbsp;</body></message>", "restricted-xml"),
    Row("tags that do not fit", "4.9.3.13", "open", "<message></iq>", "not-well-formed"),
    Row("an attribute twice", "4.9.3.13", "open", "<iq id='1' id='2'/>", "not-well-formed"),
    Row("a prefix that is not declared", "4.9.3.13", "open", "<x:iq/>", "not-well-formed"),
    Row("a control character", "4.9.3.13", "open", "<iq>\x01</iq>", "not-well-formed"),
    Row("text between elements", "4.9.3.1", "open", "hello there", "bad-format"),
    Row("a header within a stream", "4.9.3.13", "open", OPEN, "not-well-formed"),
    # --- before authentication (RFC 6120 4.9.3.12, 5, 7) ---
    Row("a message before TLS", "4.9.3.12", "open", "<message to='a@localhost'><body>hi</body></message>", "not-authorized"),
    Row("an IQ before TLS", "4.9.3.12", "open", "<iq type='get' id='1'><ping xmlns='urn:xmpp:ping'/></iq>", "not-authorized"),
    Row("presence before authentication", "4.9.3.12", "tls", "<presence/>", "not-authorized"),
    Row("a message before authentication", "4.9.3.12", "tls", "<message to='a@localhost'><body>hi</body></message>", "not-authorized"),
    Row("a ping before authentication", "4.9.3.12", "tls", "<iq type='get' id='1' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>", "not-authorized"),
    Row("bind before authentication", "7.1", "tls", f"<iq type='set' id='1'><bind xmlns='{ns.BIND}'/></iq>", "not-authorized"),
    Row("an element nobody knows before authentication", "4.9.3.12", "tls", "<enable xmlns='urn:xmpp:sm:3'/>", "not-authorized"),
    Row("STARTTLS under TLS", "5.4.2.2", "tls", f"<starttls xmlns='{ns.TLS}'/>", "tls:failure"),
    Row("a SASL response without an exchange", "6.4.3", "tls", f"<response xmlns='{ns.SASL}'>AAAA</response>", "not-authorized"),
    Row("more bytes than a stranger may send", "13.12", "tls", "<iq type='set' id='1'><q xmlns='urn:example:q'>" + "x" * 80_000, "policy-violation"),
    # --- SASL (RFC 6120 6) ---
    Row("authentication without TLS", "6.5.4", "open", auth("PLAIN", b64("\0romeo\0secret")), "sasl:encryption-required"),
    Row("a mechanism that was not offered", "6.5.7", "tls", auth("DIGEST-MD5", ""), "sasl:invalid-mechanism"),
    Row("no mechanism", "6.5.7", "tls", f"<auth xmlns='{ns.SASL}'/>", "sasl:invalid-mechanism"),
    Row("data that is not base64", "6.5.5", "tls", auth("PLAIN", "this is not base64!"), "sasl:incorrect-encoding"),
    Row("elements where data is due", "6.5.8", "tls", f"<auth xmlns='{ns.SASL}' mechanism='PLAIN'><x/></auth>", "sasl:malformed-request"),
    Row("PLAIN without its NULs", "RFC 4616 2", "tls", auth("PLAIN", b64("romeo")), "sasl:malformed-request"),
    Row("a wrong password", "6.5.10", "tls", auth("PLAIN", b64("\0violator\0wrong")), "sasl:not-authorized"),
    Row("a name that does not exist", "6.5.10", "tls", auth("PLAIN", b64("\0nobody\0secret")), "sasl:not-authorized"),
    Row("another's identity", "6.5.6", "tls", auth("PLAIN", b64("admin@localhost\0violator\0secret")), "sasl:invalid-authzid"),
    Row("SCRAM that is none", "RFC 5802 7", "tls", auth("SCRAM-SHA-1", b64("hello")), "sasl:malformed-request"),
    Row("SCRAM with a binding that was not offered", "RFC 5802 6", "tls", auth("SCRAM-SHA-1-PLUS", b64("p=tls-unique,,n=romeo,r=abc")), "sasl:not-authorized"),
    Row("SCRAM-PLUS without binding", "RFC 5802 6", "tls", auth("SCRAM-SHA-1-PLUS", b64("n,,n=romeo,r=abc")), "sasl:malformed-request"),
    Row("SCRAM that pretends the server had no binding", "RFC 5802 6", "tls", auth("SCRAM-SHA-1", b64("y,,n=violator,r=abc")), "sasl:not-authorized"),
    # --- binding (RFC 6120 7) ---
    Row("presence before binding", "7.1", "authenticated", "<presence/>", "not-authorized"),
    Row("a request to another before binding", "7.1", "authenticated", "<iq type='get' id='1' to='juliet@localhost'><ping xmlns='urn:xmpp:ping'/></iq>", "not-authorized"),
    Row("authenticating twice", "6.4.6", "authenticated", auth("PLAIN", b64("\0romeo\0secret")), "policy-violation"),
    Row("a resource with forbidden characters", "7.7.2.1", "authenticated", f"<iq type='set' id='1'><bind xmlns='{ns.BIND}'><resource>a&#x7;b</resource></bind></iq>".replace("&#x7;", "\u0085"), "stanza:jid-malformed"),
    Row("another's address behind the bind request", "8.1.2.1", "authenticated", BIND + "<iq type='set' id='2' from='admin@localhost' to='violator@localhost/bystander'><query xmlns='jabber:iq:roster'/></iq>", "invalid-from"),
    Row("another resource's address behind the bind request", "8.1.2.1", "authenticated", BIND + "<iq type='set' id='2' from='violator@localhost/other' to='violator@localhost/bystander'><query xmlns='jabber:iq:roster'/></iq>", "invalid-from"),
    Row("an element that is no stanza before binding", "4.9.3.24", "authenticated", "<letter xmlns='urn:example:x'/>", "unsupported-stanza-type"),
    # --- with a session ---
    Row("another's address", "4.9.3.9", "bound", "<message from='juliet@localhost/x' to='violator@localhost'><body>x</body></message>", "invalid-from"),
    Row("an address that is none", "4.9.3.9", "bound", "<message from='@@' to='violator@localhost'><body>x</body></message>", "invalid-from"),
    Row("an element that is no stanza", "4.9.3.24", "bound", "<letter/>", "unsupported-stanza-type"),
    Row("an element in a namespace of its own", "4.9.3.24", "bound", "<x xmlns='urn:example:x' type='get' id='1'/>", "unsupported-stanza-type"),
    Row("such an element for somebody else", "4.9.3.24", "bound", f"<failure xmlns='{ns.SASL}' to='violator@localhost/bystander'><not-authorized/></failure>", "unsupported-stanza-type"),
    Row("a stanza with a prefix", "4.9.3.2", "bound", "<c:message xmlns:c='jabber:client'/>", "bad-namespace-prefix"),
    Row("a stanza that is too large", "13.12", "bound", "<message to='violator@localhost'><body>" + "x" * 300_000 + "</body></message>", "policy-violation"),
    Row("elements that are too deep", "13.12", "bound", "<message to='violator@localhost'>" + "<a>" * 300, "policy-violation"),
    Row("too many attributes", "13.12", "bound", "<message " + " ".join(f"a{n}='1'" for n in range(300)) + "/>", "policy-violation"),
    Row("a tag that never ends", "13.12", "bound", "<message to='" + "x" * 40_000, "policy-violation"),
    Row("a comment in a session", "11.1", "bound", "<message><!-- x --></message>", "restricted-xml"),
    Row("bytes that are not UTF-8 in a session", "4.9.3.22", "bound", b"<message><body>\xc3\x28</body></message>", "unsupported-encoding"),
    Row("a `to` that is none", "8.3.3.8", "bound", "<message to='a@b@c' id='1'><body>x</body></message>", "stanza:jid-malformed"),
    Row("a `to` that is too long", "8.3.3.8", "bound", f"<message to='{'x' * 1024}@localhost' id='1'><body>x</body></message>", "stanza:jid-malformed"),
    Row("an IQ without an id", "8.1.3", "bound", "<iq type='get'><ping xmlns='urn:xmpp:ping'/></iq>", "stanza:bad-request"),
    Row("presence with an impossible priority", "RFC 6121 4.7.2.3", "bound", "<presence id='1'><priority>1000</priority></presence>", "stanza:bad-request"),
    Row("subscribing to nobody", "RFC 6121 3.1", "bound", "<presence id='1' type='subscribe'/>", "stanza:bad-request"),
    Row("whitespace", "4.6.1", "bound", "   \n\t ", "nothing"),
    Row("what the client says was wrong", "4.9.1", "bound", "<stream:error><undefined-condition xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>", "nothing"),
]  # fmt: skip


def test_the_table_is_as_long_as_we_say() -> None:
    assert len(ROWS) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.fixture
async def name(installation: Installation) -> str:
    if not getattr(installation, "violator", False):
        await installation.add_account("violator@localhost")
        installation.violator = True  # type: ignore[attr-defined]
    return "violator"


@pytest.fixture
async def bystander(installation: Installation, name: str):
    """Another user, who must see nothing of it."""
    client = RawClient(installation.address, installation.port, HOST)
    await client.log_in(name, "secret", "bystander")
    yield client
    await client.close()


async def standing_at(at: str, installation: Installation, name: str) -> RawClient:
    client = RawClient(installation.address, installation.port, HOST)
    await client.connect()
    if at == "plain":
        return client
    if at == "open":
        await client.open()
        return client
    await client.encrypt()
    if at == "tls":
        return client
    await client.authenticate(name, "secret")
    if at == "bound":
        await client.bind()
    return client


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.at}: {row.name} ({row.clause})")
async def test_violation_gets_its_answer(
    row: Row, installation: Installation, name: str, bystander: RawClient
) -> None:
    client = await standing_at(row.at, installation, name)
    try:
        await client.send(row.sent)
        kind, _, condition = row.answer.rpartition(":")
        if row.answer == "nothing":
            assert await client.ping() == []
        elif kind == "":
            closed = await client.closed()
            assert closed.condition == condition
        elif kind == "sasl":
            failure = await client.element()
            assert failure.tag == f"{{{ns.SASL}}}failure"
            assert failure[0].tag == f"{{{ns.SASL}}}{condition}"
        elif kind == "tls":
            failure = await client.element()
            assert failure.tag == f"{{{ns.TLS}}}failure"
            await client.closed()
        else:
            answer = await client.element()
            assert answer.get("type") == "error", etree.tostring(answer)
            assert answer.find(f"{{{ns.CLIENT}}}error/{STANZA_ERRORS}{condition}") is not None, etree.tostring(answer)
    finally:
        await client.abort()
    assert await bystander.ping() == [], "another user saw something of it"


async def test_bytes_behind_starttls_are_dropped(installation: Installation, name: str) -> None:
    """RFC 6120 5.3.3: what was sent in clear behind <starttls/> must not count as if it were encrypted."""
    client = RawClient(installation.address, installation.port, HOST)
    await client.connect()
    await client.open()
    injected = f"<starttls xmlns='{ns.TLS}'/>" + OPEN + auth("PLAIN", b64(f"\0{name}\0secret"))
    await client.send(injected)
    assert (await client.element()).tag == f"{{{ns.TLS}}}proceed"
    await client.start_tls()
    features = await client.open()
    assert features.find(f"{{{ns.SASL}}}mechanisms") is not None, "the injected authentication must not have counted"
    await client.authenticate(name, "secret")
    await client.close()


async def test_guessing_passwords_ends_the_stream(installation: Installation, name: str) -> None:
    """RFC 6120 6.4.5: some retries, then policy-violation."""
    client = await standing_at("tls", installation, name)
    for _ in range(5):
        await client.send(auth("PLAIN", b64(f"\0{name}\0wrong")))
    assert (await client.closed()).condition == "policy-violation"
    await client.abort()


async def test_failed_authentication_can_be_tried_again_on_the_same_stream(
    installation: Installation, name: str
) -> None:
    """RFC 6120 6.4.5."""
    client = await standing_at("tls", installation, name)
    await client.send(auth("PLAIN", b64(f"\0{name}\0wrong")))
    assert (await client.element()).tag == f"{{{ns.SASL}}}failure"
    await client.authenticate(name, "secret")
    await client.close()


async def test_a_client_may_send_its_next_header_ahead(installation: Installation, name: str) -> None:
    """What is sent behind <auth/> belongs to the stream that begins with its success (RFC 6120 6.4.6)."""
    client = await standing_at("tls", installation, name)
    await client.send(auth("PLAIN", b64(f"\0{name}\0secret")) + OPEN)
    answer = await client.raw_until(b"</stream:features>")
    assert b"<success" in answer
    assert answer.index(b"<success") < answer.index(b"<stream:stream") < answer.index(b"<bind")
    await client.abort()


async def test_a_client_may_send_its_bind_request_ahead(installation: Installation, name: str) -> None:
    """And what its session is to send behind it; all of it with <auth/>, or with the header behind that. At every node: the
    router that serves the stream before it has a session may not be the one that keeps the session."""
    behind = OPEN + BIND + "<presence/><iq type='get' id='2' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>"
    for address, with_auth in itertools.product(installation.client_addresses, (True, False)):
        client = RawClient(address, installation.port, HOST)
        await client.connect()
        await client.encrypt()
        await client.send(auth("PLAIN", b64(f"\0{name}\0secret")) + (behind if with_auth else ""))
        await client.raw_until(b"</success>")
        if not with_auth:
            await client.send(behind)
        answer = await client.raw_until(b'id="2"')
        assert answer.index(b"<stream:features>") < answer.index(b'id="1"') < answer.index(b"<jid>")
        await client.abort()


async def test_a_slow_client_is_read_byte_by_byte(installation: Installation, name: str) -> None:
    """A header that comes in crumbs is a header (RFC 6120 4.2)."""
    client = RawClient(installation.address, installation.port, HOST)
    await client.connect()
    client.restart()
    for byte in OPEN.encode():
        await client.send(bytes((byte,)))
    assert (await client.element()).find(f"{{{ns.TLS}}}starttls") is not None
    await client.close()


async def test_a_half_open_connection_ends_its_session(installation: Installation, name: str) -> None:
    """A client that vanishes without a word is unavailable to its other sessions (RFC 6121 4.5.2)."""
    watching = RawClient(installation.address, installation.port, HOST)
    await watching.log_in(name, "secret", "watching")
    await watching.send("<presence/>")
    assert (await watching.element()).get("from") == watching.jid
    gone = RawClient(installation.address, installation.port, HOST)
    await gone.log_in(name, "secret", "gone")
    await gone.send("<presence/>")
    assert (await watching.element()).get("from") == gone.jid
    await gone.abort()
    last = await watching.element()
    assert (last.get("from"), last.get("type")) == (gone.jid, "unavailable")
    await watching.close()


async def test_unknown_names_answer_scram_as_known_ones_do(installation: Installation, name: str) -> None:
    """RFC 6120 13.11: the salt of a name that does not exist is always the same, and like a real one."""

    async def first(user: str) -> dict[str, str]:
        client = await standing_at("tls", installation, name)
        await client.send(auth("SCRAM-SHA-256", b64(f"n,,n={user},r=abcdefgh")))
        challenge = await client.element()
        await client.abort()
        assert challenge.tag == f"{{{ns.SASL}}}challenge"
        return dict(part.split("=", 1) for part in base64.b64decode(challenge.text).decode().split(","))

    nobody, again, somebody = await first("nobody-here"), await first("nobody-here"), await first(name)
    assert nobody["s"] == again["s"]
    assert nobody["i"] == somebody["i"]
    assert len(nobody["s"]) == len(somebody["s"])


async def test_bad_input_does_not_make_memory_grow(installation: Installation, name: str) -> None:
    """Thousands of broken streams, ever-new names among them, leave nothing behind."""

    async def broken(number: int) -> None:
        client = RawClient(installation.address, installation.port, HOST)
        await client.connect()
        names = "".join(f"<n{number}x{n} a{number}y{n}='1'/>" for n in range(100))
        await client.send(OPEN + f"<iq>{names}</iq><!-- end -->")
        await client.closed()
        await client.abort()

    # What the allocator keeps at first is no leak; a leak of a KiB a stream would show in every round.
    growth = []
    for start in range(0, 8000, 1000):
        before = installation.rss_kib()
        for number in range(start, start + 1000):
            await broken(number)
        growth.append(installation.rss_kib() - before)
        if start and growth[-1] < 512:
            return
    raise AssertionError(f"memory grows by {growth} KiB a thousand streams")


async def test_names_without_end_in_a_session_do_not_fill_memory(installation: Installation, name: str) -> None:
    """The parser is renewed at a stanza boundary before ever-new names fill its tables."""
    client = await standing_at("bound", installation, name)

    async def flood(start: int, count: int) -> None:
        for number in range(start, start + count):
            names = "".join(f"<n{number}x{n} xmlns='urn:{number}'/>" for n in range(100))
            await client.send(f"<iq type='result' id='{number}'>{names}</iq>")
        assert await client.ping() == []

    growth = []
    for start in range(0, 6000, 1000):
        before = installation.rss_kib()
        await flood(start, 1000)
        growth.append(installation.rss_kib() - before)
        if start and growth[-1] < 1024:
            break
    else:
        raise AssertionError(f"memory grows by {growth} KiB a hundred thousand names")
    await client.close()


async def test_an_idle_stranger_is_asked_to_leave(tmp_path) -> None:
    """--auth-timeout: RFC 6120 4.9.3.4."""
    impatient = Installation("in-process", tmp_path, ["--auth-timeout=300ms"])
    impatient.start()
    try:
        client = RawClient(impatient.address, impatient.port, HOST)
        await client.connect()
        await client.open()
        assert (await client.closed()).condition == "connection-timeout"
        await client.abort()
    finally:
        impatient.stop()


async def test_the_process_lives_after_all_this(installation: Installation) -> None:
    assert all(process.poll() is None for process in installation.processes.values())
    with pytest.raises(Closed):
        client = RawClient(installation.address, installation.port, HOST)
        await client.connect()
        await client.open()
        await client.send("</stream:stream>")
        await client.element()
    await client.abort()
