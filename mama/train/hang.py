"""What becomes of a run that hangs: its job goes back in the queue, unless it came no further than at its last hang."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from mama.errors import ConfigError, LaterError, TrainingError
from mama.run.files import read_object, write_json
from mama.runtime import preemption
from mama.runtime.ending import end_process

FILE = "hung.json"  # in the run folder
TURN = 15.0  # seconds that each rank leaves to those before it, to requeue the job


def judged(run: Path, step: int, message: str) -> LaterError | TrainingError:
    """The error that ends a run in which nothing has moved since it had taken `step` steps.

    `LaterError` if the run can go on from its last checkpoint. `TrainingError` if it came no further than at its last
    hang: it would hang for ever. All ranks of one start get the same answer; the first that asks decides.
    """
    try:
        before = read_object(run / FILE)
    except ConfigError:  # there is none, or it is damaged
        before = {}
    if before.get("start") == _start():
        failed = before["failed"]
    else:
        failed = not before.get("failed", True) and step <= before["step"]
        with suppress(OSError):
            write_json(run / FILE, {"step": step, "start": _start(), "failed": failed})
    if failed:
        return TrainingError(f"{message}. It hung at step {before['step']} before: it is not started again by itself")
    return LaterError(f"{message}. Run again, it continues from its last checkpoint")


def end_hung(run: Path, rank: int, step: int, message: str) -> None:
    """End this process, a rank of a run that hangs, from any thread; its job goes back in the queue if `judged` so."""
    error = judged(run, step, message)
    if not isinstance(error, LaterError):
        end_process(error)
    if "SLURM_JOB_ID" in os.environ:
        time.sleep(TURN * min(rank, 3))  # one of them suffices; but the first may be the one that is stopped
    preemption.end_and_requeue(error, preemption.requeue_later)


def _start() -> str:
    """The same for all ranks of one start, and another for the next: they meet elsewhere, or in another job."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(os.environ.get(name, "") for name in names)
