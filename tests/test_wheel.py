"""A wheel built from the checkout works outside of it and finds the shipped configs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.checkout import CHECKOUT

SHIPPED = sorted(path.relative_to(CHECKOUT / "configs").as_posix() for path in CHECKOUT.glob("configs/**/*.yaml"))


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, CHECKOUT, cwd=folder)
    (built,) = folder.glob("mama_clip-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_rooms_and_every_config_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    facts = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"mama", "shards", "slurm", facts}
    assert SHIPPED
    assert sorted(name[len("mama/configs/") :] for name in names if name.endswith(".yaml")) == SHIPPED
    assert f"{facts}/licenses/LICENSE" in names
    files = (path for room in ("mama", "shards", "slurm") for path in (CHECKOUT / room).rglob("*") if path.is_file())
    sources = {path.relative_to(CHECKOUT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert sources <= set(names)


def test_the_installed_command_runs_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    text = run(sys.executable, installed / "bin" / "mama", "--help", cwd=tmp_path, path=installed)
    for verb in ("quickstart", "pack", "check", "train", "consolidate", "eval", "report"):
        assert verb in text


def test_the_installed_package_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    program = """
import json
import mama, shards, slurm
from mama.settings.load import shipped_configs
folder = shipped_configs()
configs = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
print(json.dumps([[mama.__file__, shards.__file__, slurm.__file__, str(folder)], configs]))
"""
    paths, configs = json.loads(run(sys.executable, "-c", program, cwd=tmp_path, path=installed))
    assert all(Path(path).is_relative_to(installed) for path in paths), paths
    assert configs == SHIPPED


def test_what_a_gpu_machine_is_brought_is_pinned() -> None:
    """`tests/gpu/wheels.sh` takes the versions of constraints.txt."""
    listed = (CHECKOUT / "tests/gpu/wheels.sh").read_text().partition("packages=(\n")[2].partition("\n)")[0]
    wanted = {name for line in listed.splitlines() for name in line.partition("#")[0].split()} | {"deepspeed"}
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (CHECKOUT / "constraints.txt").open()}
    assert len(wanted) > 10
    assert wanted <= pinned
