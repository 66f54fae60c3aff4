"""Python runs this at the start of every process that has this folder on its path: it plants the bug that is named."""

from __future__ import annotations

import os

if name := os.environ.get("PLANTED_BUG"):
    from tests.drills.planted.bugs import BUGS

    BUGS[name]()
