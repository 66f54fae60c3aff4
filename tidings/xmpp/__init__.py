"""The sans-IO core: XMPP without sockets, clocks, tasks or logs.

Bytes in, events out, bytes to send. What is here can be tested to the last branch without a port:

- `jid`       addresses (RFC 7622)
- `errors`    stream, stanza and SASL errors that carry their wire condition
- `stanza`    elements as raw bytes with their routing fields; templates for what a server says
- `parser`    bytes to first-level elements; restricted XML and the size limits live here
- `framing/`  how streams begin and end on a transport: TCP; WebSocket and BOSH beside it
- `events`    what comes out of a stream
- `stream`    the server's side of a client stream as a (state, input) table
- `sasl`      the messages of SASL mechanisms, and the keys that are stored
"""
