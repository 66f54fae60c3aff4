"""What a router does with what it has when it learns that the cluster has put it out."""

from __future__ import annotations

from pathlib import Path

from services.router.messages import ArchiveQuery
from services.router.messages_sql import SqlMessageStore
from tests.unit.router.nodes import HOST, running, soon
from tidings.xmpp.jid import Jid


async def test_it_writes_what_its_own_sessions_have_sent_and_nothing_that_others_deal_with(tmp_path: Path) -> None:
    """Drills, LONG, seeds 2 and 5. Written as it woke, a message came behind later ones of its sender, whose router had
    sent it another way and had got an error; and one came twice, for it was confirmed at the session's next router."""
    async with running(tmp_path, "a", "b", strategy="broadcast") as nodes:
        await nodes.up("a", "b")
        romeo, nurse, juliet = [await nodes.client(*who) for who in (("romeo", "a"), ("nurse", "b"), ("juliet", "b"))]
        nodes.members["b"].unsure = True
        for writer in nodes.routers["b"]._messages._writers:
            writer._awake -= 60.0  # it has stood still for a minute
        romeo.say(f"juliet@{HOST}/r", 1)
        nurse.say(f"juliet@{HOST}/r", 2)
        await soon(lambda: sorted(juliet.numbers()) == [1, 2], "delivery waits for no commit")
        asked = nodes.members["b"].asked
        await soon(lambda: nodes.members["b"].asked >= asked + 2, "it was tried to write them")
        await nodes.waiting("juliet", 0)
        nodes.members["b"].is_put_out = True
        await nodes.routers.pop("b").stop()
        archive = SqlMessageStore(nodes.databases[""])
        page = await archive.page(Jid("juliet", HOST, ""), ArchiveQuery())
        assert [b">2<" in kept.stanza for kept in page.messages] == [True]
