"""How far a training is, from the log in its run folder: step, loss, rate, remaining time, and whether it stands."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mama.settings.schema import Config

LAST_BYTES = 2**16  # of the log; about a hundred entries
RECENT = 10  # entries whose median rate is the present one: the first after a start, and those with a save, are slow
STILL_AFTER = 5  # times the usual time between two entries, after which a training counts as standing still
STILL_AT_LEAST, FIRST_STEP = 60.0, 600.0  # seconds; FIRST_STEP: to load, to compile and to take the first one


@dataclass(frozen=True)
class Progress:
    """What the log of a run says."""

    taken: int  # steps taken
    steps: int  # steps of the whole run
    loss: float | None = None
    pairs_per_second: float | None = None  # in the last entry
    seconds_per_step: float | None = None  # over the last entries, within each process that wrote them

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the present rate; None if that is unknown."""
        return None if self.seconds_per_step is None else self.seconds_per_step * (self.steps - self.taken)


def read_progress(config: Config) -> Progress:
    """Read the last entries of the run's log. A rate is measured between two entries of one process.

    So neither a pause between two starts, nor the time before them, counts.
    """
    entries = [entry for entry in _last_entries(config.run_folder / "log.jsonl") if "loss/total" in entry]
    if not entries:
        return Progress(0, config.train.steps)
    rates = [rate for entry in entries if (rate := entry.get("pairs_per_second"))]
    recent = [config.train.global_batch / rate for rate in rates[-RECENT:]]
    return Progress(
        taken=entries[-1]["step"] + 1,
        steps=config.train.steps,
        loss=entries[-1]["loss/total"],
        pairs_per_second=rates[-1] if rates else None,
        seconds_per_step=statistics.median(recent) if recent else None,
    )


def standstill(config: Config, progress: Progress) -> str:
    """For a training that runs: since when it has taken no step, and what its first rank does; empty if it goes on."""
    starts = ("environment.json", "stages/train.json")  # written when it starts
    last = max(_changed(config.run_folder / name) for name in ("log.jsonl", *starts))
    seconds = time.time() - last
    usual = (progress.seconds_per_step or 0.0) * config.train.log_every * STILL_AFTER
    if not last or seconds < (max(usual, STILL_AT_LEAST) if usual else FIRST_STEP):
        return ""
    doing = _activity(config.run_folder / "alive" / "rank-0.json")
    return f"no step for {duration(seconds)}" + (f"; its first rank is {doing}" if doing else "")


def duration(seconds: float) -> str:
    """A time in the unit that suits it: `45 s`, `12 min`, `3.3 h`, `2.5 d`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def _last_entries(path: Path) -> list[dict[str, Any]]:
    """The entries at the end of a log; a line that is not complete, as it is being written, is left out."""
    return [entry for line in last_lines(path) if (entry := _entry(line))]


def last_lines(path: Path, size: int = LAST_BYTES) -> list[str]:
    """The lines within the last `size` bytes of a file; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - size)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if start else lines


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _activity(path: Path) -> str:
    """What a rank was doing at its last heartbeat."""
    try:
        return str(json.loads(path.read_text())["doing"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
