"""What stands in examples/, as somebody else would use it: installed by itself, beside Tidings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tidings.api.registry.v1.registry_pb2 import ListNodesRequest
from tidings.api.registry.v1.registry_pb2_grpc import RegistryServiceStub
from tidings.testing.plays import Stage, read
from tidings.testing.server import ONE_PROCESS, Installation

ROOT = Path(__file__).parents[2]
STRATEGY = ROOT / "examples/strategy_zone"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of installed packages with nothing but the strategy in it; it is on the path."""
    folder = tmp_path_factory.mktemp("site")
    # A copy is built, so that nothing is left among our files.
    source = shutil.copytree(STRATEGY, tmp_path_factory.mktemp("source") / "strategy")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--target", folder, source,
        ],
        check=True, timeout=110,
    )  # fmt: skip
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def call(*words: str, cwd: Path) -> str:
    """What a program of the same installation prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_strategy_is_found_by_its_name_and_by_its_dotted_path(site: Path, tmp_path: Path) -> None:
    program = """
from tidings.kit.strategies import strategy_factory
import strategy_zone
print(strategy_zone.__file__)
assert strategy_factory("zone") is strategy_factory("strategy_zone.Zone") is strategy_zone.Zone
"""
    assert call("-c", program, cwd=tmp_path).strip() == str(site / "strategy_zone.py")
    listed = call("-m", "tidings", "options", "--json", "--sm-cluster-strategy-class=zone", cwd=tmp_path)
    assert '"value": "zone"' in listed


def test_the_tests_of_the_strategy_pass(site: Path, tmp_path: Path) -> None:
    tests = shutil.copytree(STRATEGY / "tests", tmp_path / "tests")
    assert " passed" in call("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), cwd=tmp_path)


async def test_plays_pass_under_the_strategy(site: Path, tmp_path: Path) -> None:
    installation = Installation(ONE_PROCESS, tmp_path, strategy="zone")
    try:
        installation.start()
        channel = installation.dial(installation.registry_address)
        registry: Any = RegistryServiceStub(channel)
        (node,) = (await registry.ListNodes(ListNodesRequest(), timeout=10)).nodes
        await channel.close()
        assert node.strategy == "zone"
        for play in read(ROOT / "tests/conformance/plays/rfc6121_messages.play")[:3]:
            await Stage(installation).perform(play)
    finally:
        codes = installation.stop()
    assert codes == {"all": 0}
