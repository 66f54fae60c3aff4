"""XEP-0441: accounts say what goes into their archive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from lxml import etree

from services.router.archive_rules import ArchiveRules
from services.router.messages import Preferences
from services.router.modules.xep_0441_mam_prefs import MAX_LISTED
from services.router.sessions import Session
from tests.unit.router.archive import JULIET, ArchiveRouter, condition
from tests.unit.router.memory_router import HOST
from tidings.xmpp import ns


@pytest.fixture
async def router() -> AsyncIterator[ArchiveRouter]:
    made = ArchiveRouter()
    yield made
    await made.stop()


@pytest.fixture
async def juliet(router: ArchiveRouter) -> Session:
    return await router.session("juliet")


def prefs(default: str = "", always: str | None = None, never: str | None = None) -> str:
    """The payload of a request; lists are JIDs apart by spaces, None leaves the list out."""
    lists = ""
    for name, listed in (("always", always), ("never", never)):
        if listed is not None:
            lists += f"<{name}>{''.join(f'<jid>{jid}</jid>' for jid in listed.split())}</{name}>"
    return f"<prefs xmlns='{ns.MAM}'{f' default={chr(39)}{default}{chr(39)}' if default else ''}>{lists}</prefs>"


def said(got: list[etree._Element]) -> tuple[str | None, list[str | None], list[str | None]]:
    (answer,) = got
    assert answer.get("type") == "result", etree.tostring(answer)
    (found,) = answer
    assert found.tag == f"{{{ns.MAM}}}prefs"
    always, never = found
    assert (always.tag, never.tag) == (f"{{{ns.MAM}}}always", f"{{{ns.MAM}}}never")
    return found.get("default"), [jid.text for jid in always], [jid.text for jid in never]


@pytest.mark.parametrize(("setting", "default"), [("true", "always"), ("false", "never")])
async def test_who_has_set_nothing_gets_what_the_host_does(setting: str, default: str) -> None:
    """2.1: both lists are there, also empty."""
    router = ArchiveRouter(f"--archive[{HOST}]={setting}")
    juliet = await router.session("juliet")
    assert said(await router.ask(juliet, "get", prefs())) == (default, [], [])
    await router.stop()


@pytest.mark.parametrize("default", ["always", "never", "roster"])
async def test_what_is_set_is_answered_and_kept(router: ArchiveRouter, juliet: Session, default: str) -> None:
    """2.1, 2.1.1"""
    wanted = (default, ["romeo@montague.lit"], ["montague@montague.lit", "nurse@capulet.lit/kitchen"])
    payload = prefs(
        default, "Romeo@Montague.LIT romeo@montague.lit", "montague@montague.lit nurse@capulet.lit/kitchen"
    )
    assert said(await router.ask(juliet, "set", payload, str(JULIET))) == wanted
    assert said(await router.ask(juliet, "get", prefs())) == wanted


async def test_a_list_that_is_not_written_is_empty(router: ArchiveRouter, juliet: Session) -> None:
    """2.1.2, 2.1.3"""
    await router.ask(juliet, "set", prefs("always", "a@b.lit", "c@d.lit"))
    assert said(await router.ask(juliet, "set", prefs("roster"))) == ("roster", [], [])
    assert said(await router.ask(juliet, "get", prefs())) == ("roster", [], [])


@pytest.mark.parametrize(
    ("payload", "wanted"),
    [
        (prefs(), "modify bad-request"),
        (prefs("sometimes"), "modify bad-request"),
        (prefs("always", "a@b.lit", "A@b.lit"), "modify bad-request"),
        (prefs("always", "@"), "modify jid-malformed"),
        (prefs("always", " ".join(f"u{number}@b.lit" for number in range(MAX_LISTED + 1))), "modify not-acceptable"),
    ],
)
async def test_preferences_that_are_not_in_order_are_refused_and_change_nothing(
    router: ArchiveRouter, juliet: Session, payload: str, wanted: str
) -> None:
    (answer,) = await router.ask(juliet, "set", payload)
    assert condition(answer) == wanted
    assert await router.archive.preferences(JULIET) is None


@pytest.mark.parametrize("type_", ["get", "set"])
async def test_somebody_elses_preferences_are_forbidden(router: ArchiveRouter, juliet: Session, type_: str) -> None:
    romeo = await router.session("romeo")
    (answer,) = await router.ask(romeo, type_, prefs("never"), str(JULIET))
    assert condition(answer) == "auth forbidden"
    assert await router.archive.preferences(JULIET) is None


LISTS = (("full@x.lit/a", "bare@x.lit"), ("bare@x.lit/never", "full@x.lit"))


class Contacts:
    """A roster that has one contact."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def has(self, _account: str, contact: str) -> bool | None:
        self.asked.append(contact)
        return contact == "contact@x.lit"


@pytest.mark.parametrize(
    ("preferences", "host_default", "peer", "wanted"),
    [
        # Nothing is set.
        (None, True, "romeo@x.lit", True),
        (None, False, "romeo@x.lit", False),
        # 2.1.1
        (Preferences("always", (), ()), False, "romeo@x.lit", True),
        (Preferences("never", (), ()), True, "romeo@x.lit", False),
        (Preferences("roster", (), ()), True, "contact@x.lit/r", True),
        (Preferences("roster", (), ()), True, "contact@x.lit", True),
        (Preferences("roster", (), ()), True, "stranger@x.lit/r", False),
        # 2.1.2, 2.1.3, 2.3.1: a listed bare JID is every resource, a full one only itself, and goes first.
        *((Preferences(default, *LISTS), True, "bare@x.lit/any", True) for default in ("always", "never", "roster")),
        *((Preferences(default, *LISTS), True, "bare@x.lit", True) for default in ("always", "never", "roster")),
        *(
            (Preferences(default, *LISTS), True, "bare@x.lit/never", False)
            for default in ("always", "never", "roster")
        ),
        *((Preferences(default, *LISTS), True, "full@x.lit/a", True) for default in ("always", "never", "roster")),
        *((Preferences(default, *LISTS), True, "full@x.lit/b", False) for default in ("always", "never", "roster")),
        *((Preferences(default, *LISTS), True, "full@x.lit", False) for default in ("always", "never", "roster")),
        (Preferences("never", *LISTS), True, "other@x.lit", False),
        (Preferences("always", *LISTS), True, "other@x.lit", True),
    ],
)
def test_preferences_decide_what_is_archived(
    preferences: Preferences | None, host_default: bool, peer: str, wanted: bool
) -> None:
    contacts: Any = Contacts()
    store: Any = None
    rules = ArchiveRules(store, contacts, lambda _host: host_default, [JULIET.domain])
    rules.put(JULIET, preferences)
    assert rules.archives(JULIET, peer) is wanted
    assert all("/" not in asked for asked in contacts.asked)
    assert not contacts.asked or (preferences is not None and preferences.default == "roster")
    rules.forget(str(JULIET))
    assert rules.archives(JULIET, peer) is host_default


async def test_a_session_that_starts_while_the_database_is_away_does_not_wait_for_its_preferences() -> None:
    router = ArchiveRouter()
    await router.archive.set_preferences(JULIET, Preferences("never", (), ()))
    juliet = await router.session("juliet")
    router.archive.away = True
    (started,) = router.hooks.session_started
    waiting = started(juliet)
    assert waiting is not None
    async with asyncio.timeout(1):
        await waiting
    await router.stop()
