"""Remarks that were needed twice: `make check` makes them now."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MOST_LINES = 500

# What must not stand where, and why.
RULES = [
    (re.compile(r"\b(TODO|FIXME|XXX)\b"), "tidings services", "unfinished work is named in an issue, not in the code"),
    (re.compile(r"\bNotImplementedError\b"), "tidings services", "no stubs"),
    (re.compile(r"^\s*(?:await )?(?:asyncio|time)\.sleep\((?!RETRY|LOOK|0\.0|0\)|min\()[0-9.]*[1-9]"), "tests", "wait for a condition, not for a time"),
    (re.compile(r"pytest\.(skip|mark\.skip|importorskip|mark\.xfail)"), "tests", "a need that is missing is a failure"),
    (re.compile(r"(?<!\.)\bcreate_task\((?!.*name=)"), "tidings services", "every task has an owner: use Tasks.spawn"),
    (re.compile(r"\.(?:Join|Beat|Leave|ListNodes|CreateAccount|SetPassword|DeleteAccount|ListAccounts|GetRosterItem)\((?!self)(?!.*timeout=)(?=.*Request\()"), "tidings services", "every call has a deadline"),
]  # fmt: skip


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split() if "_pb2" not in name and Path(name).exists()]


def main() -> int:
    found = []
    for path in tracked():
        if path == Path("tests/lint.py"):
            continue
        lines = path.read_text().splitlines()
        if len(lines) > MOST_LINES and path.parts[0] != "tests":
            found.append(f"{path}: {len(lines)} lines; cut it where its concerns part (at most {MOST_LINES})")
        for pattern, folders, why in RULES:
            if path.parts[0] in folders.split():
                found += [f"{path}:{n}: {why}" for n, line in enumerate(lines, 1) if pattern.search(line)]
        if path.stem in ("utils", "common", "helpers", "manager"):
            found.append(f"{path}: a name that says nothing; call it by what it does")
    print("\n".join(found) or "lint: in order", file=sys.stderr if found else sys.stdout)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
