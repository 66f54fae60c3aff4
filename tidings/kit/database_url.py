"""Where the database is: `--user-db-uri` in the notations that people use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tidings.kit.options import OptionError, Options

MYSQL_PORT = 3306
_SCHEMES = ("mysql", "mariadb", "mysql+aiomysql")


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """A database's address. Several hosts are tried in their order, by every node in the same one."""

    backend: str
    hosts: tuple[tuple[str, int], ...] = ()
    database: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    path: Path | None = None


def database_url(options: Options) -> DatabaseUrl:
    """The database that the options name. Raises OptionError."""
    uri: str = options["user-db-uri"]
    if not uri:
        return DatabaseUrl("sqlite", path=Path(options["data-dir"]) / "tidings.sqlite")
    return parse(uri)


def parse(uri: str) -> DatabaseUrl:
    """`jdbc:mysql://h1:3306,h2/db?user=u&password=p`, `mysql://u:p@h/db` or `sqlite:///path`."""
    text = uri.removeprefix("jdbc:")
    scheme, separator, rest = text.partition("://")
    if scheme == "sqlite" and separator:
        path = unquote(rest.removeprefix("/")) if rest.startswith("/") else unquote(rest)
        if not path:
            raise OptionError(["--user-db-uri=sqlite:///PATH needs a path"])
        return DatabaseUrl("sqlite", path=Path(path))
    if scheme not in _SCHEMES or not separator:
        raise OptionError(["--user-db-uri begins with jdbc:mysql://, mysql:// or sqlite:///; this one does not"])
    # There are no fragments here: a # belongs to a name or password.
    parts = urlsplit(f"mysql://{rest.replace('#', '%23')}")
    credentials, at, places = parts.netloc.rpartition("@")
    query = parse_qs(parts.query, keep_blank_values=True)
    user, password = "", ""
    if at:
        user, _, password = credentials.partition(":")
        user, password = unquote(user), unquote(password)
    user = query.get("user", [user])[-1]
    password = query.get("password", [password])[-1]
    database = unquote(parts.path.strip("/"))
    if not database or not places:
        raise OptionError(["--user-db-uri needs a host and a database: jdbc:mysql://HOST:3306/DATABASE?user=…"])
    return DatabaseUrl("mysql", tuple(_host(place) for place in places.split(",")), database, user, password)


def _host(place: str) -> tuple[str, int]:
    host, colon, port = place.rpartition(":")
    if not colon or place.endswith("]"):
        host, port = place, str(MYSQL_PORT)
    if not port.isdigit():
        raise OptionError([f"--user-db-uri: {place!r} is no host with a port"])
    return host.strip("[]"), int(port)
