"""The work of one step of a point: what a job of a sweep runs, on a cluster or on this machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mama.errors import ConfigError, RankError, StoppedError, TrainingError
from mama.run.checkpoint_marker import steps_taken
from mama.run.files import sha256_or_reason, write_json
from mama.run.kept_settings import MAY_CHANGE, changed_setting, flat, is_among
from mama.run.portable import MODEL
from mama.runtime.ending import told_of_end
from mama.settings.load import load_run
from mama.settings.schema import Config
from mama.settings.values import with_settings
from mama.sweep import status
from mama.sweep.status import Status
from mama.sweep.sweep import SHARED, Point, Sweep
from shards.errors import ShardError, one_line
from shards.pack.settings import PackConfig
from shards.read.manifest import MANIFEST
from slurm.profile import SlurmError
from slurm.task import first_task, job_id

ON_ALL_TASKS = ("train", "eval")  # these share the work over the tasks of a job; in other steps the first one does all
MOVABLE = ("name", "runs")  # settings that say where a run lies; a point may be moved


@dataclass(frozen=True)
class Work:
    """One step of one point, or of the shards that points share."""

    sweep: str  # name of the sweep
    unit: str  # name of the point, or of the shards
    step: str
    config: Config  # of the point, with the evaluation's own settings
    differs: dict[str, Any]  # axis -> value, as `Sweep.values`
    status: Path  # its status file
    in_job: bool = False  # whether a Slurm job runs it

    @property
    def settings(self) -> str:
        """The digest of the settings that the result depends on."""
        return hashlib.sha256(json.dumps(self._relevant(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _relevant(self) -> dict[str, Any]:
        if self.step in SHARED:
            packed = _without_workers(self.config.pack)
            if self.step == "check":
                packed["manifest"] = sha256_or_reason(Path(self.config.pack.out) / MANIFEST)
            return packed
        ignored = (*MAY_CHANGE, *MOVABLE) if self.step in ("train", "consolidate") else ("pack", "train", *MOVABLE)
        relevant = {key: value for key, value in flat(asdict(self.config)).items() if not is_among(key, ignored)}
        if self.step not in ("train", "consolidate"):
            relevant["eval.boxes"] = [sha256_or_reason(Path(file).expanduser()) for file in self.config.eval.boxes]
        return relevant

    def is_done(self) -> bool:
        """Whether the step was done with these settings, and its result is still there."""
        found = status.read(self.status)
        return bool(found and found.state == "done" and self._has_settings_of(found) and self._result_exists())

    def _has_settings_of(self, found: Status) -> bool:
        """Whether the step was done with these settings. A later release may have more of them, with their defaults."""
        if found.settings == self.settings:
            return True
        run = self.config.run_folder
        if self.step not in ("train", "consolidate") or not (run / "config.yaml").exists():
            return False
        return changed_setting(flat(asdict(load_run(run))), flat(asdict(self.config))) is None

    def _result_exists(self) -> bool:
        run = self.config.run_folder
        if self.step == "pack":
            return (Path(self.config.pack.out) / MANIFEST).exists()
        if self.step == "train":
            # Checkpoints may be deleted once there is a model.
            return steps_taken(run) >= self.config.train.steps or (run / "model").exists()
        if self.step == "consolidate":
            return (run / "model" / MODEL).exists()  # a model of an earlier release is written again
        if self.step == "check":
            return True
        return any(run.glob("eval*/complete.json")) or any(run.glob("eval-on/*/complete.json"))


def work_of(sweep: Sweep, point: Point, step: str, in_job: bool = False) -> Work:
    """The work of a step of a point; points with the same shards get equal work for `pack` and `check`."""
    if step in SHARED:
        name = shards_name(point.config.pack)
        return Work(sweep.name, name, step, point.config, {}, sweep.own / "shared" / name / f"{step}.json", in_job)
    changes = next((e.settings for e in sweep.evaluations if e.name == step), {})
    config = with_settings(point.config, changes)
    place = point.config.run_folder / "stages" / f"{step}.json"
    return Work(sweep.name, point.name, step, config, sweep.values(point), place, in_job)


def shards_name(pack: PackConfig) -> str:
    """The name that points with these shards have in common: that of the folder, and a digest of how it is packed."""
    digest = hashlib.sha256(json.dumps(_without_workers(pack), sort_keys=True, default=str).encode()).hexdigest()
    return f"{Path(pack.out).name}-{digest[:8]}"


def run_step(work: Work) -> None:
    """Do the work, and record in its status file that it runs, and how it ended.

    Every task of a job calls this. Raises what the step raises.
    """
    first = first_task()
    if not first and work.step not in ON_ALL_TASKS:
        return
    job = job_id() if work.in_job else None
    started = status.start(work.status, work.settings, job) if first else None

    def leave(error: Exception) -> None:
        if isinstance(error, StoppedError):
            if started:
                status.end(work.status, started, "stopped", one_line(error))
            return
        current = started or status.read(work.status)  # read now: the first task may have written it since
        if current and current.job == job:
            status.end(work.status, current, "failed", _cause(error))

    with told_of_end(leave):
        try:
            _do(work, first)
        except Exception as error:
            leave(error)
            raise
    if started:
        status.end(work.status, started, "done")


def _cause(error: Exception) -> str:
    """The first line of an error: our own messages are complete, others need their type."""
    own = isinstance(error, ConfigError | RankError | ShardError | SlurmError | TrainingError)
    line = next(iter(str(error).strip().splitlines()), "")
    return line if own and line else f"{type(error).__name__}: {line}"


def _do(work: Work, first: bool) -> None:
    """Call what the verb of the command line calls; each import takes seconds, so only its own step pays for it."""
    config = work.config
    if work.step == "pack":
        from shards.pack.pack import pack

        pack(config.pack)
    elif work.step == "check":
        _check(Path(config.pack.out))
    elif work.step == "train":
        from mama.train.loop import train

        if first:
            config.run_folder.mkdir(parents=True, exist_ok=True)
            write_json(config.run_folder / "point.json", {"sweep": work.sweep, "differs": work.differs})
        train(config)
    elif work.step == "consolidate":
        from mama.export.consolidate import consolidate

        if (taken := steps_taken(config.run_folder)) < config.train.steps:
            steps = config.train.steps
            raise ConfigError(f"{config.run_folder}: has taken {taken} of {steps} steps; run the sweep again")
        consolidate(config)
    else:
        from mama.finetune.fine_tune import evaluate

        evaluate(config, config.run_folder)


def _check(folder: Path) -> None:
    from shards.check.check import check_all

    problems = [problem for found in check_all([folder]).values() for problem in found]
    if problems:
        more = f"; and {len(problems) - 1} more: mama check {folder}" if problems[1:] else ""
        raise ShardError(f"{folder}: {problems[0]}{more}")


def _without_workers(pack: PackConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(pack).items() if key != "workers"}


def require_settings(before: dict[str, Any], now: dict[str, Any], point: str) -> None:
    """Raise `ConfigError` if the flat settings of a point that was begun have changed in what it is trained with."""
    if key := changed_setting(before, now):
        raise ConfigError(
            f"{point}: {key}: {now.get(key)!r}, but the point was begun with {before.get(key)!r}; give that value, "
            "or the sweep another name=..."
        )
