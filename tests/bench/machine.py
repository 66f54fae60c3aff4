"""What a page of figures says about where they come from."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

from tidings import __version__


def written_by(target: str) -> str:
    """When and where `make target` has measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return (
        f"Written by `make {target}` on {datetime.date.today():%Y-%m-%d}, Tidings {__version__}: {os.cpu_count()} cores "
        f"({model}), Python {platform.python_version()}, {platform.system()} {platform.release().split('-')[0]}."
    )
