"""The copy of the code that a job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import slurm.snapshot
from slurm.profile import SlurmError
from slurm.snapshot import snapshot
from tests.support.checkout import CHECKOUT


def test_the_copy_runs_without_the_checkout(tmp_path: Path) -> None:
    place = snapshot(tmp_path)
    program = "import mama.settings.load as l; print(l.__file__, l.load('quickstart').name)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(place / "mama" / "settings" / "load.py"), "quickstart"]


def test_the_same_code_is_copied_once_and_changed_code_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = snapshot(tmp_path)
    before = (first / "mama" / "__init__.py").stat().st_mtime_ns
    assert snapshot(tmp_path) == first
    assert (first / "mama" / "__init__.py").stat().st_mtime_ns == before
    read = slurm.snapshot._files
    monkeypatch.setattr(slurm.snapshot, "_files", lambda: {**read(), "mama/__init__.py": b"# edited\n"})
    second = snapshot(tmp_path)
    assert second != first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((first.name, second.name)), "nothing else is left"


def test_a_copy_that_was_changed_is_one_line(tmp_path: Path) -> None:
    place = snapshot(tmp_path)
    (place / "slurm" / "profile.py").write_text("# edited\n")
    with pytest.raises(SlurmError, match=r"slurm/profile\.py: differs from the code .* delete ") as caught:
        snapshot(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_at_once_make_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is faster: its copy appears while this one still writes."""
    rename: Callable[[Path, Path], None] = os.rename

    def rename_late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        assert snapshot(tmp_path) == target
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    place = snapshot(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
