"""For tests, ours and those of component authors: real, small things instead of mocks.

- `client`    a raw XMPP client that sends what it is told, also what no library would
- `plays`     readable plays of clients, run against any installation
- `server`    an installation for a test: one process, or several
- `mariadb`   a MariaDB of one's own
"""
