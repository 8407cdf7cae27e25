"""Resumable checkpoints: `checkpoints/step-000500/`, complete only when its marker file is there.

A checkpoint is written beside its place and renamed, the marker being the last file in it. Resuming
takes the newest complete one; whatever is torn is left alone and named in the log.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mama.config import ConfigError
from mama.dist import barrier, rank, world_size

if TYPE_CHECKING:  # what only looks for checkpoints does without it
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

MARKER = "complete.json"
TAG = "state"  # DeepSpeed's name for the folder inside


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob(f"step-*[0-9]/{MARKER}"))


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    return int(json.loads((checkpoint / MARKER).read_text())["step"])


def save(engine: DeepSpeedEngine, run: Path, step: int, keep: int) -> None:
    """Write the state after `step` steps; every rank must call it. Older ones than `keep` are deleted."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    aside = folder.with_name(folder.name + ".partial")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    engine.save_checkpoint(str(aside), tag=TAG, client_state={"step": step})
    barrier()
    if rank() == 0:
        (aside / MARKER).write_text(json.dumps({"step": step, "ranks": world_size()}))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in checkpoints(run)[:-keep]:
            (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never complete
            shutil.rmtree(old)
    barrier()


def resume(engine: DeepSpeedEngine, run: Path) -> int:
    """Load the newest complete checkpoint into the engine; returns the steps already taken, 0 if none."""
    complete = checkpoints(run)
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if folder not in complete and rank() == 0:
            log.warning("%s is not complete and is ignored", folder)
    if not complete:
        return 0
    newest = complete[-1]
    ranks = json.loads((newest / MARKER).read_text())["ranks"]
    if ranks != world_size():
        raise ConfigError(
            f"train.ranks: {newest} was written by {ranks} ranks, this run has {world_size()}; use {ranks}"
        )
    engine.load_checkpoint(str(newest), tag=TAG)
    log.info("resumed from %s", newest)
    return step_of(newest)
