"""XEP-0198 by a raw client. Clause numbers are those of version 1.6.3."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from tidings.testing.client import RawClient, Tree, show
from tidings.testing.server import Installation
from tidings.xmpp import ns

BODY = f"{{{ns.CLIENT}}}body"


def sm(name: str) -> str:
    return f"{{{ns.SM}}}{name}"


class Client(RawClient):
    """A client that counts."""

    id = ""
    got = 0

    async def count(self, resume: bool = True) -> None:
        wanted = " resume='true'" if resume else ""
        await self.send(f"<enable xmlns='{ns.SM}'{wanted}/>")
        answer = await self.of(sm("enabled"))
        self.id = answer.get("id", "")
        self.got = 0

    async def of(self, name: str) -> Tree:
        """The next element of a name; messages that come meanwhile are lost to the test, and counted."""
        while True:
            tree = await self.element()
            if tree.tag.startswith(f"{{{ns.CLIENT}}}"):
                self.got += 1
            elif tree.tag == sm("r"):
                await self.send(f"<a xmlns='{ns.SM}' h='{self.got}'/>")
            if tree.tag == name:
                return tree

    async def bodies(self, count: int, answers: bool = True) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            tree = await self.element()
            if tree.tag == sm("r") and answers:
                await self.send(f"<a xmlns='{ns.SM}' h='{self.got}'/>")
            if tree.tag.startswith(f"{{{ns.CLIENT}}}"):
                self.got += 1
            if (body := tree.findtext(BODY)) is not None:
                found.append(body)
        return found

    async def acknowledged(self, h: int) -> None:
        """Asks until so many are acknowledged."""
        await self.send(f"<r xmlns='{ns.SM}'/>")
        while True:
            answer = await self.of(sm("a"))
            assert int(answer.get("h", "")) <= h, show(answer)
            if answer.get("h") == str(h):
                return


def message(to: str, body: str) -> str:
    return f"<message to='{to}' type='chat' id='{body}'><body>{body}</body></message>"


@pytest.fixture
async def people(installation: Installation) -> AsyncIterator[People]:
    made = People(installation)
    await installation.add_accounts(f"{made.romeo}@localhost", f"{made.juliet}@localhost")
    yield made
    for client in made.clients:
        await client.abort()


class People:
    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.romeo, self.juliet = (f"{name}-{secrets.token_hex(4)}" for name in ("romeo", "juliet"))
        self.clients: list[Client] = []

    def _client(self) -> Client:
        addresses = self.installation.client_addresses
        client = Client(addresses[len(self.clients) % len(addresses)], self.installation.port, "localhost")
        self.clients.append(client)
        return client

    async def enters(self, name: str, resource: str = "r") -> Client:
        """Each at the next node."""
        client = self._client()
        await client.log_in(name, "secret", resource)
        await client.send("<presence/>")
        client.put_back(await client.ping())
        return client

    async def resumes(self, name: str, id_: str, h: int) -> tuple[Client, Tree]:
        """At the next node: the stream, and the answer to <resume/>."""
        client = await self.authenticates(name)
        await client.send(f"<resume xmlns='{ns.SM}' previd='{id_}' h='{h}'/>")
        answer = await client.element()
        client.id = id_
        client.got = h
        return client, answer

    async def authenticates(self, name: str) -> Client:
        client = self._client()
        await client.connect()
        await client.encrypt()
        features = await client.authenticate(name, "secret")
        assert features.find(sm("sm")) is not None, "3: it is offered once the client has authenticated"
        return client


async def test_what_is_stored_is_acknowledged_and_what_a_session_confirms_is_not_offered_again(
    people: People,
) -> None:
    """4."""
    romeo, juliet = await people.enters(people.romeo), await people.enters(people.juliet)
    await romeo.count()
    await juliet.count()
    for number in range(5):
        await romeo.send(message(juliet.jid, str(number)))
    await romeo.acknowledged(5)
    assert await juliet.bodies(5) == ["0", "1", "2", "3", "4"]
    await juliet.send(f"<a xmlns='{ns.SM}' h='{juliet.got}'/>")
    await juliet.send("</stream:stream>")
    await juliet.closed()
    again = await people.enters(people.juliet)
    await romeo.send(message(again.jid, "new"))
    assert await again.bodies(1) == ["new"]


async def test_a_session_resumes_on_another_stream_and_nobody_sees_it_gone(people: People) -> None:
    """5: through any connector."""
    romeo, juliet = await people.enters(people.romeo), await people.enters(people.juliet)
    await romeo.count()
    await juliet.count()
    await romeo.send(message(juliet.jid, "0") + message(juliet.jid, "1"))
    assert await juliet.bodies(2, answers=False) == ["0", "1"]
    await juliet.abort()
    await romeo.send(message(juliet.jid, "2") + message(f"{people.juliet}@localhost", "3"))
    await romeo.acknowledged(4)
    juliet, answer = await people.resumes(people.juliet, juliet.id, 1)
    assert answer.tag == sm("resumed"), show(answer)
    assert (answer.get("previd"), answer.get("h")) == (juliet.id, "0")
    assert await juliet.bodies(3) == ["1", "2", "3"]
    await juliet.send(message(romeo.jid, "back"))
    await juliet.acknowledged(1)
    assert await romeo.bodies(1) == ["back"]


async def test_what_was_not_acknowledged_comes_again_and_arrives_once(people: People) -> None:
    """5: a stream that breaks in the midst of a message takes what was whole."""
    romeo, juliet = await people.enters(people.romeo), await people.enters(people.juliet)
    await romeo.count()
    await romeo.send(message(juliet.jid, "0") + message(juliet.jid, "1"))
    await romeo.send(message(juliet.jid, "2")[:-15])
    await romeo.abort()
    romeo, answer = await people.resumes(people.romeo, romeo.id, 0)
    handled = int(answer.get("h", ""))
    for number in range(handled, 4):
        await romeo.send(message(juliet.jid, str(number)))
    await romeo.acknowledged(4)
    assert await juliet.bodies(4) == ["0", "1", "2", "3"]


async def test_the_old_stream_gives_way_to_the_new_one(people: People) -> None:
    """5: <conflict/>."""
    before = await people.enters(people.juliet)
    await before.count()
    after, answer = await people.resumes(people.juliet, before.id, 0)
    assert answer.tag == sm("resumed"), show(answer)
    closed = await before.closed()
    assert closed.condition == "conflict"
    await after.ping()


async def test_who_can_not_resume_may_bind(people: People) -> None:
    """5: <failed/> with item-not-found, and then as if nothing had been."""
    romeo = await people.enters(people.romeo)
    await romeo.count()
    juliet, answer = await people.resumes(people.juliet, romeo.id, 0)
    assert answer.tag == sm("failed"), show(answer)
    assert answer[0].tag == f"{{{ns.STANZA_ERRORS}}}item-not-found"
    await juliet.bind("r")
    await romeo.ping()


async def test_enabling_is_for_those_who_are_bound(people: People) -> None:
    """3."""
    romeo = await people.authenticates(people.romeo)
    await romeo.send(f"<enable xmlns='{ns.SM}'/>")
    answer = await romeo.element()
    assert (answer.tag, answer[0].tag) == (sm("failed"), f"{{{ns.STANZA_ERRORS}}}unexpected-request")
    await romeo.bind("r")
    await romeo.count(resume=False)
    assert not romeo.id, "who does not want to resume gets no id"


async def test_more_than_was_sent_can_not_be_acknowledged(people: People) -> None:
    """6."""
    romeo = await people.enters(people.romeo)
    await romeo.count()
    await romeo.send(f"<a xmlns='{ns.SM}' h='1000'/>")
    closed = await romeo.closed()
    assert closed.condition == "undefined-condition"
    assert closed.error is not None
    assert closed.error.find(sm("handled-count-too-high")) is not None


async def test_a_message_to_somebody_absent_is_acknowledged_when_it_is_stored(people: People) -> None:
    romeo = await people.enters(people.romeo)
    await romeo.count()
    for number in range(3):
        await romeo.send(message(f"{people.juliet}@localhost", str(number)))
    await romeo.acknowledged(3)
    juliet = await people.enters(people.juliet)
    assert await juliet.bodies(3) == ["0", "1", "2"]


async def test_what_nobody_has_confirmed_goes_to_the_next_session(people: People) -> None:
    romeo, juliet = await people.enters(people.romeo), await people.enters(people.juliet)
    await romeo.count()
    await juliet.count(resume=False)
    await romeo.send(message(juliet.jid, "0") + message(f"{people.juliet}@localhost", "1"))
    await romeo.acknowledged(2)
    await juliet.abort()
    phone = await people.enters(people.juliet, "phone")
    assert await phone.bodies(2) == ["0", "1"]
