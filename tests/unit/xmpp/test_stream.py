"""The server's side of a client stream: RFC 6120 4 to 7."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.xmpp import ns
from tidings.xmpp.errors import SaslError, StreamError
from tidings.xmpp.events import (
    NonzaReceived,
    SaslInitiated,
    SaslResponded,
    StanzaReceived,
    StartTls,
    StreamEnded,
    StreamOpened,
)
from tidings.xmpp.jid import Jid
from tidings.xmpp.stream import (
    TRANSITIONS,
    WAITING,
    Input,
    ServerStream,
    State,
    StreamConfig,
)

HEADER = b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0' to='h' from='a@h' xml:lang='it'>"
AUTH = f"<auth xmlns='{ns.SASL}' mechanism='PLAIN'>AAAA</auth>".encode()
STARTTLS = f"<starttls xmlns='{ns.TLS}'/>".encode()
BIND = f"<iq type='set' id='b'><bind xmlns='{ns.BIND}'/></iq>".encode()
CONFIG = StreamConfig(hosts=frozenset({"h"}))


def led_to(state: State) -> ServerStream:
    """A stream in a state, by the shortest way."""
    stream = ServerStream(CONFIG)
    if state is State.OPENING:
        return stream
    stream.receive_data(HEADER)
    if state is State.STARTING_TLS:
        stream.receive_data(STARTTLS)
        return stream
    if state is State.CLOSED:
        stream.close()
        return stream
    stream.receive_data(STARTTLS)
    stream.tls_started()
    stream.receive_data(HEADER)
    stream.features(b"")
    if state is State.NEGOTIATING:
        return stream
    stream.receive_data(AUTH)
    if state is State.JUDGING:
        return stream
    if state is State.CHALLENGED:
        stream.challenge(b"c")
        return stream
    stream.authenticated(None)
    if state is State.REOPENING:
        return stream
    stream.receive_data(HEADER)
    if state is State.REOPENED:
        return stream
    stream.features(b"")
    if state is State.BINDING:
        return stream
    stream.receive_data(BIND)
    if state is State.ASKED:
        return stream
    stream.bound(Jid.parse("a@h/r"), b"<iq type='result' id='b'/>")
    return stream


SENT = {
    Input.STARTTLS: STARTTLS,
    Input.AUTH: AUTH,
    Input.RESPONSE: f"<response xmlns='{ns.SASL}'>AAAA</response>".encode(),
    Input.ABORT: f"<abort xmlns='{ns.SASL}'/>".encode(),
    Input.STANZA: b"<iq type='get' id='1'><ping xmlns='urn:xmpp:ping'/></iq>",
    Input.NONZA: b"<r xmlns='urn:xmpp:sm:3'/>",
    Input.FOOTER: b"</stream:stream>",
    Input.HEADER: HEADER,
}


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_reached(state: State) -> None:
    assert led_to(state).state is state


@pytest.mark.parametrize("state", [state for state in State if state not in WAITING and state is not State.CLOSED])
@pytest.mark.parametrize("what", SENT)
def test_every_input_in_every_state_does_what_the_table_says(state: State, what: Input) -> None:
    """What the table does not allow ends the stream with an error, and nothing is taken after it."""
    stream = led_to(state)
    stream.data_to_send()
    if state in (State.OPENING, State.REOPENING) and what not in (Input.HEADER, Input.FOOTER):
        events = stream.receive_data(SENT[what])
        assert isinstance(events[-1], StreamEnded)  # no header yet: not even XML of a stream
        return
    if state in (State.OPENING, State.REOPENING) and what is Input.FOOTER:
        return  # without a header a closing tag is not well-formed; see the violations
    events = stream.receive_data(SENT[what])
    following = TRANSITIONS.get((state, what))
    if what is Input.STARTTLS and state is State.NEGOTIATING:
        following = None  # allowed by the table, but there is TLS already
    if what is Input.HEADER and state not in (State.OPENING, State.REOPENING):
        following = None
    if following is None:
        assert isinstance(events[-1], StreamEnded)
        assert events[-1].error is not None
        assert stream.state is State.CLOSED
        assert stream.data_to_send().endswith(b"</stream:stream>")
        assert stream.receive_data(b"<presence/>") == []
    else:
        assert stream.state is following
        assert (following is State.CLOSED) == any(isinstance(event, StreamEnded) for event in events)


def test_the_whole_way_through_tls_sasl_and_bind() -> None:
    stream = ServerStream(CONFIG)
    assert stream.receive_data(HEADER) == []
    sent = stream.data_to_send()
    assert b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>" in sent
    assert b' from="h"' in sent
    assert b' to="a@h"' in sent, "RFC 6120 4.7.2"
    assert b'xml:lang="it"' in sent, "RFC 6120 4.7.4"
    first_id = stream.id
    assert stream.receive_data(STARTTLS) == [StartTls()]
    assert b"<proceed" in stream.data_to_send()
    stream.tls_started()
    assert stream.receive_data(HEADER) == [StreamOpened("h", "it", True, False)]
    assert stream.id != first_id, "RFC 6120 4.7.3"
    stream.features(b"<m/>")
    assert b"<stream:features><m/></stream:features>" in stream.data_to_send()
    assert stream.receive_data(AUTH) == [SaslInitiated("PLAIN", b"\0\0\0")]
    stream.challenge(b"")
    assert b"<challenge xmlns='urn:ietf:params:xml:ns:xmpp-sasl'></challenge>" in stream.data_to_send()
    assert stream.receive_data(SENT[Input.RESPONSE]) == [SaslResponded(b"\0\0\0")]
    stream.authenticated(b"")
    assert b">=</success>" in stream.data_to_send(), "RFC 6120 6.4.6"
    assert stream.receive_data(HEADER) == [StreamOpened("h", "it", True, True)]
    stream.features(b"<bind/>")
    bound = stream.receive_data(BIND)
    assert isinstance(bound[0], StanzaReceived)
    stream.bound(Jid.parse("a@h/r"), b"<iq/>")
    events = stream.receive_data(b"<message to='b@h'/><r xmlns='urn:xmpp:sm:3'/></stream:stream>")
    assert isinstance(events[0], StanzaReceived)
    assert events[0].stamped == b'<message from="a@h/r" xml:lang="it" to=\'b@h\'/>'
    assert events[2] == StreamEnded(None)


def test_no_initial_response_differs_from_an_empty_one() -> None:
    """RFC 6120 6.4.2."""
    empty = led_to(State.NEGOTIATING)
    assert empty.receive_data(AUTH.replace(b"AAAA", b"=")) == [SaslInitiated("PLAIN", b"")]
    none = led_to(State.NEGOTIATING)
    assert none.receive_data(AUTH.replace(b"AAAA", b"")) == [SaslInitiated("PLAIN", None)]


def test_what_comes_ahead_of_an_answer_waits_for_it() -> None:
    stream = led_to(State.NEGOTIATING)
    assert len(stream.receive_data(AUTH + HEADER)) == 1
    assert stream.receive_data(BIND) == []
    stream.authenticated(None)
    assert [type(event) for event in stream.receive_data(b"")] == [StreamOpened]
    assert stream.receive_data(SENT[Input.STANZA]) == []
    assert stream.receive_data(b"") == []
    stream.features(b"<bind/>")
    assert [type(event) for event in stream.receive_data(b"")] == [StanzaReceived]
    assert stream.receive_data(b"") == []
    stream.bound(Jid.parse("a@h/r"), b"<iq/>")
    assert [type(event) for event in stream.receive_data(b"")] == [StanzaReceived]


def test_what_comes_with_the_header_behind_authentication_waits_for_its_features() -> None:
    """Another router may have to serve the stream: then that one gets it."""
    stream = led_to(State.REOPENING)
    assert [type(event) for event in stream.receive_data(HEADER + BIND + SENT[Input.STANZA])] == [StreamOpened]
    stream.features(b"<bind/>")
    assert [event.element.attrs["id"] for event in stream.receive_data(b"")] == ["b"]  # type: ignore[union-attr]


def test_what_comes_ahead_of_a_session_is_of_that_session() -> None:
    """RFC 6120 7.1: behind a request it is not known yet whether there is one. In whatever pieces it comes, it is
    stamped, and is not read before."""
    behind = b"<message to='b@h'/><presence/><r xmlns='urn:xmpp:sm:3'/></stream:stream>"
    for cut in range(len(behind)):
        stream = led_to(State.BINDING)
        assert [type(event) for event in stream.receive_data(BIND + behind[:cut])] == [StanzaReceived]
        assert stream.receive_data(behind[cut:]) == []
        stream.bound(Jid.parse("a@h/r"), b"<iq/>")
        first, *others = stream.receive_data(b"")
        assert isinstance(first, StanzaReceived)
        assert first.stamped == b'<message from="a@h/r" xml:lang="it" to=\'b@h\'/>'
        assert [type(event) for event in others] == [StanzaReceived, NonzaReceived, StreamEnded]


def test_behind_a_request_that_binds_nothing_there_may_be_another_one() -> None:
    """XEP-0198 5: after <failed/> a client binds."""
    stream = led_to(State.BINDING)
    resume = b"<resume xmlns='urn:xmpp:sm:3' previd='x' h='0'/>"
    assert [type(event) for event in stream.receive_data(resume + BIND + b"<message/>")] == [NonzaReceived]
    stream.send(b"<failed xmlns='urn:xmpp:sm:3'/>")
    assert [type(event) for event in stream.receive_data(b"")] == [StanzaReceived]
    assert stream.state is State.ASKED
    stream.send(b"<iq type='error' id='b'/>")
    (ended,) = stream.receive_data(b"")
    assert isinstance(ended, StreamEnded)
    assert ended.error is not None
    assert ended.error.condition == "not-authorized", "a message before there is a session"


def test_what_comes_ahead_of_the_features_is_bounded() -> None:
    stream = led_to(State.REOPENED)
    piece = b"<iq type='set' id='x'>" + b"x" * 100_000
    assert stream.receive_data(piece) == []
    assert stream.receive_data(piece) == []
    (ended,) = stream.receive_data(piece)
    assert isinstance(ended, StreamEnded)
    assert ended.error is not None
    assert ended.error.condition == "policy-violation"


def test_what_comes_behind_starttls_is_dropped() -> None:
    """RFC 6120 5.3.3."""
    stream = ServerStream(CONFIG)
    stream.receive_data(HEADER)
    assert stream.receive_data(STARTTLS + HEADER + AUTH) == [StartTls()]
    assert stream.receive_data(AUTH) == []
    stream.tls_started()
    assert stream.receive_data(b"") == []
    assert stream.receive_data(HEADER) == [StreamOpened("h", "it", True, False)]


def test_an_error_before_the_header_is_sent_behind_a_header_of_ours() -> None:
    """RFC 6120 4.9.1.2."""
    stream = ServerStream(CONFIG)
    stream.receive_data(b"<x/>")
    sent = stream.data_to_send()
    assert sent.index(b"<stream:stream") < sent.index(b"<stream:error>") < sent.index(b"</stream:stream>")


def test_stanzas_before_the_error_are_handed_on() -> None:
    events = led_to(State.BOUND).receive_data(b"<message/><message/><!-- x -->")
    assert [type(event) for event in events] == [StanzaReceived, StanzaReceived, StreamEnded]


def test_too_many_failures_end_the_stream() -> None:
    """RFC 6120 6.4.5."""
    stream = led_to(State.NEGOTIATING)
    for _ in range(4):
        stream.receive_data(AUTH)
        assert stream.refuse(SaslError("not-authorized")) == []
    stream.receive_data(AUTH)
    (ended,) = stream.refuse(SaslError("not-authorized"))
    assert isinstance(ended, StreamEnded)
    assert ended.error is not None
    assert ended.error.condition == "policy-violation"


def test_see_other_host_carries_the_host() -> None:
    """RFC 6120 4.9.3.19."""
    stream = led_to(State.BOUND)
    stream.close(StreamError("see-other-host", content="[2001:db8::1]:5222"))
    assert b">[2001:db8::1]:5222</see-other-host>" in stream.data_to_send()


def test_a_condition_that_no_rfc_knows_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="no such stream error"):
        StreamError("my-own-error")


@given(
    st.lists(
        st.sampled_from(
            [HEADER, STARTTLS, AUTH, BIND, b"<presence/>", b" ", b"<", b"&", b"</stream:stream>", b"\xff", b"<!--"]
        ),
        max_size=8,
    ),
    st.binary(max_size=40),
)
def test_no_input_raises_and_the_end_comes_once(pieces: list[bytes], rest: bytes) -> None:
    stream = ServerStream(StreamConfig(hosts=frozenset({"h"}), tls_required=False))
    ends = 0
    for piece in [*pieces, rest]:
        for event in stream.receive_data(piece):
            ends += isinstance(event, StreamEnded)
            if isinstance(event, SaslInitiated):
                stream.refuse(SaslError("not-authorized"))
    assert ends <= 1
    assert (ends == 1) == (stream.state is State.CLOSED)


def test_base64_of_scram_survives() -> None:
    stream = led_to(State.NEGOTIATING)
    data = b"n,,n=user,r=abc"
    events = stream.receive_data(AUTH.replace(b"AAAA", base64.b64encode(data)))
    assert events == [SaslInitiated("PLAIN", data)]
