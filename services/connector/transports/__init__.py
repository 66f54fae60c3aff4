"""The shells around `tidings.xmpp`: sockets and TLS, nothing else. One file for each transport."""
