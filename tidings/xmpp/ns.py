"""XML namespaces, each with the specification that defines it."""

XML = "http://www.w3.org/XML/1998/namespace"

# RFC 6120
CLIENT = "jabber:client"
SERVER = "jabber:server"
STREAMS = "http://etherx.jabber.org/streams"
STREAM_ERRORS = "urn:ietf:params:xml:ns:xmpp-streams"
STANZA_ERRORS = "urn:ietf:params:xml:ns:xmpp-stanzas"
TLS = "urn:ietf:params:xml:ns:xmpp-tls"
SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
BIND = "urn:ietf:params:xml:ns:xmpp-bind"
# RFC 3921, kept for old clients
SESSION = "urn:ietf:params:xml:ns:xmpp-session"
# RFC 6121
ROSTER = "jabber:iq:roster"
ROSTER_VERSIONING = "urn:xmpp:features:rosterver"
PRE_APPROVAL = "urn:xmpp:features:pre-approval"
# RFC 7395
FRAMING = "urn:ietf:params:xml:ns:xmpp-framing"
# XEP-0004
DATA_FORMS = "jabber:x:data"
# XEP-0030
DISCO_INFO = "http://jabber.org/protocol/disco#info"
DISCO_ITEMS = "http://jabber.org/protocol/disco#items"
# XEP-0059
RSM = "http://jabber.org/protocol/rsm"
# XEP-0077
REGISTER = "jabber:iq:register"
REGISTER_FEATURE = "http://jabber.org/features/iq-register"
# XEP-0085
CHAT_STATES = "http://jabber.org/protocol/chatstates"
# XEP-0092
VERSION = "jabber:iq:version"
# XEP-0160
OFFLINE_FEATURE = "msgoffline"
# XEP-0198
SM = "urn:xmpp:sm:3"
# XEP-0199
PING = "urn:xmpp:ping"
# XEP-0202
TIME = "urn:xmpp:time"
# XEP-0203
DELAY = "urn:xmpp:delay"
# XEP-0297
FORWARD = "urn:xmpp:forward:0"
# XEP-0313, XEP-0441
MAM = "urn:xmpp:mam:2"
# XEP-0334
HINTS = "urn:xmpp:hints"
# XEP-0359
STANZA_ID = "urn:xmpp:sid:0"
# XEP-0440
SASL_CB = "urn:xmpp:sasl-cb:0"
