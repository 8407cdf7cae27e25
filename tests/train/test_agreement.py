"""Two ranks that see different disks resume from one checkpoint, or end together in one line."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from mama.errors import ConfigError
from mama.run.checkpoint_marker import MARKER
from mama.run.run_folder import prepare
from mama.runtime.collectives import barrier, rank
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, DataConfig
from mama.train import agreement
from tests.support.checkpoint_folder import saved
from tests.support.cohort import SIZE, write_shards
from tests.support.tiny_model import tiny

pytestmark = pytest.mark.ranks
RUN = Path("runs/run")


def late() -> None:
    """What rank 0 has resumes to appears on rank 1 after a while: files first, the marker last."""
    place = RUN / "checkpoints" / "step-000004"
    shutil.move(place / MARKER, "marker")
    threading.Timer(0.8, shutil.move, ("marker", place / MARKER)).start()


def lagging() -> None:
    shutil.rmtree(RUN / "checkpoints" / "step-000004")


def scored() -> None:
    """The same files, and another marker."""
    shutil.copy(RUN / "checkpoints" / "step-000002" / MARKER, RUN / "checkpoints" / "step-000004" / MARKER)


def other_tokenizer() -> None:
    (RUN / "tokenizer" / "tokenizer.json").write_text("{}")


def no_run() -> None:
    shutil.rmtree("runs")


def empty() -> None:
    shutil.rmtree(RUN / "checkpoints")


# What is other on rank 1, with the beginning of what both then say; None: both resume from step 4.
CASES: list[tuple[Callable[[], object], str | None]] = [
    (int, None),
    (late, None),
    (
        lagging,
        r"runs/run/checkpoints/step-000004: rank 1 on \S+ sees \S+: .*No such file.*, rank 0 on \S+ [0-9a-f]{12} ",
    ),
    (scored, r"runs/run/checkpoints/step-000004: rank 1 on \S+ sees .*was edited or damaged"),
    (
        other_tokenizer,
        r"runs/run/tokenizer: rank 1 on \S+ sees [0-9a-f]{12}, rank 0 on \S+ [0-9a-f]{12} \(after 2 s",
    ),
    (no_run, r"runs/run/tokenizer: rank 1 on \S+ sees nothing, "),
]


def see(config: Config) -> list[str]:
    """What rank 1 comes to in each case, and then with other settings, and where rank 0 has no checkpoint."""
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    disk, config = Path(config.runs), replace(config, runs="runs")
    found = []
    for change, _ in CASES:
        own_disk(disk)
        if rank() == 1:
            change()
        found.append(outcome(config))
    own_disk(disk)
    if rank() == 0:
        empty()
    found.append(outcome(config))
    barrier()
    return found


def own_disk(disk: Path) -> None:
    """A copy for each rank, in which it works."""
    place = Path(tempfile.mkdtemp(dir=disk.parent)) / "disk"
    shutil.copytree(disk, place)
    os.chdir(place)


def outcome(config: Config) -> str:
    try:
        with patch.object(agreement, "WAIT", 2.0):
            return str(agreement.prepare_and_agree(config))
    except ConfigError as error:
        return str(error)


def test_ranks_that_see_different_files_wait_or_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    write_shards(disk / "shards", {"train": 4})
    base = tiny(2)
    data = DataConfig(shards=["shards"], image_size=SIZE, max_tokens=64, workers=0)
    config = replace(base, name="run", runs="runs", data=data)
    monkeypatch.chdir(disk)
    prepare(config)
    for step in (2, 4):
        saved(disk / RUN, step)
    *found, none = run_on_ranks(see, replace(config, runs=str(disk)))
    for said, (change, expected) in zip(found, CASES, strict=True):
        if expected is None:
            assert said == "runs/run/checkpoints/step-000004", change
        else:
            assert "\n" not in said
            assert re.match(expected, said), (change, said)
    assert none == "None", "rank 0 decides"
