"""SASL messages and keys: RFC 4616, 5802, 7677."""

from __future__ import annotations

import pytest
from scramp import ScramClient, ScramMechanism

from tidings.xmpp.errors import SaslError
from tidings.xmpp.sasl import Plain, derive_keys, fake_salt, parse_plain, parse_scram_first, verify_plain


def test_plain_message_is_read() -> None:
    assert parse_plain(b"\0romeo\0s\xc3\xa9cret") == Plain("", "romeo", "sécret")
    assert parse_plain(b"a@h\0romeo\0x") == Plain("a@h", "romeo", "x")


@pytest.mark.parametrize("data", [b"", b"romeo", b"\0romeo", b"\0\0secret", b"\0romeo\0", b"\0a\0b\0c", b"\0\xff\0x"])
def test_bad_plain_message_is_malformed(data: bytes) -> None:
    with pytest.raises(SaslError) as error:
        parse_plain(data)
    assert error.value.condition == "malformed-request"


def test_scram_first_message_is_read_with_its_escapes() -> None:
    """RFC 5802 5.1."""
    first = parse_scram_first(b"p=tls-server-end-point,a=x=3Dy,n=a=2Cb,r=abc")
    assert (first.binding, first.authzid, first.username) == ("p=tls-server-end-point", "x=y", "a,b")
    assert first.bare == "n=a=2Cb,r=abc"


@pytest.mark.parametrize(
    "data",
    [b"", b"n,,", b"n,,n=,r=x", b"n,,n=a", b"n,,n=a=,r=x", b"n,,m=1,n=a,r=x", b"x,,n=a,r=x", b"\xff", b"n,,n=a,r="],
)
def test_bad_scram_first_message_is_malformed(data: bytes) -> None:
    with pytest.raises(SaslError) as error:
        parse_scram_first(data)
    assert error.value.condition == "malformed-request"


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-1", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_our_first_message_parser_takes_what_scramp_sends(mechanism: str) -> None:
    client = ScramClient([mechanism], "romeo", "secret")
    assert parse_scram_first(client.get_client_first().encode()).username == "romeo"


@pytest.mark.parametrize("name", ["SHA-1", "SHA-256", "SHA-512"])
def test_our_keys_are_those_of_scramp(name: str) -> None:
    salt = b"0123456789abcdef"
    theirs = ScramMechanism(f"SCRAM-{name}").make_auth_info("pencil", 10000, salt)
    assert tuple(derive_keys(name, "pencil", salt, 10000)) == tuple(theirs)


def test_rfc_5802_example_keys() -> None:
    """RFC 5802 5: the exchange of user "user" with password "pencil"."""
    import base64
    import hashlib
    import hmac

    keys = derive_keys("SHA-1", "pencil", base64.b64decode("QSXCR+Q6sek8bf92"), 4096)
    message = (
        b"n=user,r=fyko+d2lbbFgONRv9qkxdawL,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096,"
        b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j"
    )
    signature = hmac.digest(keys.server_key, message, hashlib.sha1)
    assert base64.b64encode(signature) == b"rmF9pqV8S7suAoZWja4dJRkFsKQ="


def test_plain_is_verified_against_stored_keys() -> None:
    keys = derive_keys("SHA-256", "correct horse", b"salt" * 4, 4096)
    assert verify_plain("SHA-256", "correct horse", keys)
    assert not verify_plain("SHA-256", "wrong horse", keys)
    assert not verify_plain("SHA-256", "bad\x00horse", keys)


def test_fake_salt_is_stable_and_differs_by_name() -> None:
    key = b"k" * 32
    assert fake_salt(key, "h", "a", "SHA-1") == fake_salt(key, "h", "a", "SHA-1")
    assert len({fake_salt(key, h, u, n) for h in ("h", "i") for u in ("a", "b") for n in ("SHA-1", "SHA-256")}) == 8
