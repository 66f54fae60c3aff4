"""Plays: what clients send and what each must receive, in a form that a person reads.

    # RFC 6121 8.5.2.1.1
    title: a message to a bare JID reaches every session with a non-negative priority

    romeo enters
    juliet enters as balcony
    romeo sends
        <message to='{juliet.bare}' type='chat'><body>But soft!</body></message>
    juliet receives
        <message from='{romeo}' type='chat'><body>But soft!</body></message>

Lines: `X enters [as RESOURCE]` (logs in and sends presence), `X connects [as RESOURCE]` (logs in only),
`X2 enters like X [as RESOURCE]` (another session of the same account), `X exists` (an account, no session),
`X sends`, `X receives` (one or more elements, in this order), `X receives in any order`, `X receives nothing`,
`X leaves` (closes properly), `X vanishes` (drops the connection), `X is closed with CONDITION`, `X forgets` (drops
what it has received so far).

An element matches when it has the name, the attributes and the children that are written, in any order of
children; `*` stands for any value, and an attribute written as `-` must not be there. What is not written may be
anything. `{romeo}` is a full JID, `{romeo.bare}` the bare one, `{host}` the virtual host.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lxml import etree

from tidings.testing.client import Closed, RawClient, show
from tidings.testing.server import Installation

# Through how many routers one after the other an effect may go: a stanza, what it brings about, and the answer.
HOPS = 3

_NAME = re.compile(r"\{([a-z0-9]+)(\.[a-z]+)?\}")


@dataclass
class Play:
    """One play, as written."""

    path: Path
    title: str
    clauses: list[str]
    # (line number, words, elements as text)
    lines: list[tuple[int, str, str]] = field(default_factory=list)


def read(path: Path) -> list[Play]:
    """The plays of a file. Raises ValueError for what is no play."""
    plays: list[Play] = []
    clauses: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        if line.startswith("#"):
            clauses.append(line.lstrip("# ").strip())
        elif line.startswith("title:"):
            plays.append(Play(path, line.removeprefix("title:").strip(), clauses))
            clauses = []
        elif not plays:
            raise ValueError(f"{path}:{number}: a play begins with its title")
        elif line[0].isspace():
            last = plays[-1].lines[-1]
            plays[-1].lines[-1] = (last[0], last[1], last[2] + line.strip())
        else:
            plays[-1].lines.append((number, line.strip(), ""))
    return plays


class Stage:
    """Runs one play against an installation."""

    def __init__(
        self, installation: Installation, host: str = "localhost", tls: bool = False, nodes: Sequence[int] = ()
    ) -> None:
        """The installation says topology and strategy; `nodes`: to which of its client addresses the first client,
        the second and so on connect (by default one after the other)."""
        self._installation = installation
        self._nodes = nodes
        self._host = host
        self._tls = tls
        self._clients: dict[str, RawClient] = {}
        self._accounts: dict[str, str] = {}

    async def perform(self, play: Play) -> None:
        try:
            for number, words, elements in play.lines:
                try:
                    await self._line(words.split(), elements)
                except (AssertionError, TimeoutError, Closed, KeyError, etree.XMLSyntaxError) as error:
                    raise AssertionError(
                        f"{play.path.name}:{number}: {words}\n{elements}\n{type(error).__name__}: {error}"
                    ) from error
        finally:
            for client in self._clients.values():
                await client.abort()

    async def _line(self, words: list[str], elements: str) -> None:
        name, verb, rest = words[0], words[1], words[2:]
        if verb in ("enters", "connects"):
            await self._enter(name, verb, rest)
            return
        if verb == "exists":
            await self._account(name)
            return
        client = self._clients[name]
        if verb == "sends":
            await client.send(self._filled(elements))
        elif verb == "receives" and rest == ["nothing"]:
            await self._settle()
            extra = await client.ping()
            assert not extra, f"received {[show(tree) for tree in extra]}"
        elif verb == "receives":
            await self._receive(client, self._filled(elements), rest)
        elif verb == "forgets":
            await self._settle()
            await client.ping()
        elif verb == "leaves":
            # What the server has asked is answered before.
            client.put_back(await client.ping())
            await client.close()
        elif verb == "vanishes":
            await client.abort()
        elif verb == "is":
            closed = await client.closed()
            assert closed.condition == rest[-1], closed.condition
        else:
            raise ValueError(f"no such verb: {verb}")

    async def _account(self, name: str) -> str:
        if name not in self._accounts:
            self._accounts[name] = f"{name}-{secrets.token_hex(4)}"
            await self._installation.add_account(f"{self._accounts[name]}@{self._host}")
        return self._accounts[name]

    async def _enter(self, name: str, verb: str, rest: list[str]) -> None:
        account = await self._account(rest[rest.index("like") + 1] if "like" in rest else name)
        self._accounts[name] = account
        resource = rest[rest.index("as") + 1] if "as" in rest else ""
        port = self._installation.tls_port if self._tls else self._installation.port
        addresses = self._installation.client_addresses
        number = len(self._clients)
        node = self._nodes[number % len(self._nodes)] if self._nodes else number % len(addresses)
        client = RawClient(addresses[node], port, self._host)
        self._clients[name] = client
        await client.log_in(account, "secret", resource, self._tls)
        if verb == "enters":
            await client.send("<presence/>")
            own = await client.element()
            assert own.get("from") == client.jid, show(own)

    async def _settle(self) -> None:
        """Lets all that was sent so far arrive: whoever gets an answer has had its earlier stanzas handled."""
        for client in self._clients.values():
            if not client.footer:
                try:
                    client.put_back(await client.ping())
                except (Closed, ConnectionError):
                    continue
        if len(self._installation.client_addresses) > 1:
            for _ in range(HOPS):
                await self._exchange()

    async def _exchange(self) -> None:
        """Everybody writes to everybody: what went the same way before has arrived then. An effect may have to go
        several ways, one after the other, so this is done HOPS times."""
        there = [client for client in self._clients.values() if not client.footer and not client.lost]
        for sender in there:
            for receiver in there:
                # A headline reaches a full JID whatever its presence, and nothing comes back when it does not.
                await sender.send(f"<message type='headline' to='{receiver.jid}'><settle xmlns='t'/></message>")
        for client in there:
            waiting = {sender.jid for sender in there}
            kept = []
            try:
                while waiting:
                    tree = await client.element()
                    if len(tree) and tree[0].tag == "{t}settle":
                        waiting.discard(tree.get("from") or "")
                    else:
                        kept.append(tree)
            except Closed:
                client.lost = True
            client.put_back(kept)

    async def _receive(self, client: RawClient, text: str, rest: list[str]) -> None:
        wanted = list(etree.fromstring(f"<w xmlns='jabber:client'>{text}</w>"))
        if rest[:3] == ["in", "any", "order"]:
            while wanted:
                actual = await client.element()
                match = next((one for one in wanted if not difference(one, actual)), None)
                assert match is not None, f"unexpected {show(actual)}"
                wanted.remove(match)
            return
        for one in wanted:
            actual = await client.element()
            wrong = difference(one, actual)
            assert not wrong, f"{wrong}; received {show(actual)}"

    def _filled(self, text: str) -> str:
        def fill(match: re.Match[str]) -> str:
            name, part = match[1], match[2]
            if name == "host":
                return self._host
            bare = f"{self._accounts[name]}@{self._host}"
            if part == ".bare":
                return bare
            if part == ".name":
                return self._accounts[name]
            return self._clients[name].jid

        return _NAME.sub(fill, text)


def difference(wanted: Any, actual: Any) -> str:
    """What keeps `actual` from matching; '' when it matches."""
    if wanted.tag != actual.tag:
        return f"{actual.tag} is not {wanted.tag}"
    for name, value in wanted.attrib.items():
        found = actual.get(name)
        if value == "-":
            if found is not None:
                return f"{name} is there"
        elif found is None or value not in ("*", found):
            return f"{name} is {found!r}, not {value!r}"
    text = (wanted.text or "").strip()
    if text and text not in ("*", (actual.text or "").strip()):
        return f"the text is {actual.text!r}, not {text!r}"
    left = list(actual)
    for child in wanted:
        match = next((one for one in left if not difference(child, one)), None)
        if match is None:
            return f"{show(child)} is missing"
        left.remove(match)
    return ""
