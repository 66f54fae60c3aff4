"""What is planted (tests/drills/planted/bugs.py) is called as what it takes the place of: else it is found for that."""

from __future__ import annotations

from inspect import Parameter, signature
from typing import Any

import pytest

from tests.drills.planted import bugs


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_a_planted_bug_can_be_called_in_every_way_that_its_original_can(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[Any, Any]] = []

    def instead(of: type, name: str, make: Any) -> None:
        found.append((getattr(of, name), make(getattr(of, name))))

    monkeypatch.setattr(bugs, "_instead", instead)
    bugs.BUGS[bug]()
    assert found
    for original, planted in found:
        given = [
            one for one in signature(original).parameters.values() if one.kind is Parameter.POSITIONAL_OR_KEYWORD
        ]
        least = sum(one.default is Parameter.empty for one in given)
        for count in range(least, len(given) + 1):
            signature(planted).bind(*given[:count])
