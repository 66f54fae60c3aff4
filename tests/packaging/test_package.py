"""What people install: the wheel, by itself, in an empty virtual environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tidings.kit.options import load
from tidings.kit.service import installed
from tidings.testing.server import Installation

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment with nothing but `pip install .`."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [folder / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", str(ROOT)],
        check=True, env=environment, timeout=600,
    )  # fmt: skip
    return folder


@pytest.mark.timeout(600)
def test_an_installed_wheel_serves_and_answers(clean: Path) -> None:
    python = clean / "venv/bin/python"
    code = """
import services.router.migrations, services.registry.migrations, tidings.api.component.v1.component_pb2
from importlib.resources import files
assert files('services.router').joinpath('migrations/t0001_first.py').is_file()
assert files('tidings').joinpath('py.typed').is_file()
assert files('tidings.api.router.v1').joinpath('router_pb2.pyi').is_file()
"""
    subprocess.run([python, "-I", "-c", code], check=True, cwd=clean, timeout=60)
    installation = Installation("in-process", clean)
    original = sys.executable
    sys.executable = str(python)
    try:
        installation.environment = lambda _node: {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # type: ignore[method-assign]
        installation.start()
        words = ["nodes", "--json", "--bind-address=127.0.0.1", *installation.arguments()]
        listed = subprocess.run(
            [clean / "venv/bin/tidings", *words], capture_output=True, text=True, timeout=60, cwd=clean
        )
        assert '"state": "up"' in listed.stdout, listed.stderr
    finally:
        sys.executable = original
        assert installation.stop() == {"all": 0}


def test_every_entry_point_can_be_loaded() -> None:
    assert list(installed()) == ["registry", "router", "pubsub", "connector"], "in starting order"
    for spec in installed().values():
        assert callable(spec.load())
    for entry in entry_points(group="tidings.modules"):
        assert entry.load().name == entry.name


def test_the_floors_are_what_the_generated_code_asks_for() -> None:
    """Generated code refuses a runtime older than its generator: the floors must be exactly that."""
    pins = dict(
        line.split("==") for line in (ROOT / "requirements/proto.txt").read_text().splitlines() if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = dict(
        re.fullmatch(r"([a-z-]+)>=([0-9.]+)", one).groups()
        for one in project
        if re.fullmatch(r"[a-z-]+>=[0-9.]+", one)
    )  # type: ignore[union-attr]
    assert floors["grpcio"] == pins["grpcio-tools"]
    assert floors["protobuf"] == pins["protobuf"]
    generated = (ROOT / "tidings/api/router/v1/router_pb2_grpc.py").read_text()
    assert f"GRPC_GENERATED_VERSION = '{floors['grpcio']}'" in generated


def test_the_option_file_that_we_ship_is_in_order() -> None:
    options = load([f"--config={ROOT / 'deploy/init.properties'}"], {})
    assert options["virt-hosts"] == ["example.org"]


def test_no_text_of_ours_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    private = re.compile(r"/(?:work|farm|root)/[a-z]")
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".proto", ".toml", ".play", ".properties", ".txt", "") and path.is_file():
            assert not private.search(path.read_text(errors="replace")), name


@pytest.mark.timeout(600)
def test_a_foreign_services_package_is_found_out(clean: Path, tmp_path: Path) -> None:
    """One with an __init__.py earlier on the path hides ours: the start says so."""
    (tmp_path / "services").mkdir()
    (tmp_path / "services/__init__.py").write_text("")
    result = subprocess.run(
        [clean / "venv/bin/python", "-m", "tidings", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 1
    assert "remove its __init__.py" in result.stderr
    assert "Traceback" not in result.stderr
