"""A sweep without training: its run folders, status files and logs as the real writers leave them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mama.run.files import write_json
from mama.run.portable import MODEL
from mama.settings.load import save
from mama.settings.schema import Config
from mama.sweep import status
from mama.sweep.batches import RELEASED, Batch, write_batch
from mama.sweep.saved import save_sweep
from mama.sweep.sweep import Evaluation, Point, Sweep
from mama.sweep.work import work_of
from mama.train.monitor import Monitor
from tests.support.checkpoint_folder import saved
from tests.support.tiny_run import config_of

STEPS = 1000


def study(folder: Path, names: Sequence[str], profile: str = "local") -> Sweep:
    """A saved sweep `runs/study` of points that train, are consolidated and evaluated twice."""
    place = folder / "runs" / "study"
    points = []
    for seed, name in enumerate(names):
        config = config_of(folder, name, steps=STEPS)
        config = replace(config, runs=str(place), seed=seed, train=replace(config.train, log_every=10))
        points.append(Point(config, {"seed": seed}))
    evaluations = [Evaluation("eval-own"), Evaluation("eval-train", {"eval.split": "train"})]
    sweep = Sweep("study", place, points, ["train", "consolidate", "eval"], evaluations, {"default": profile})
    save_sweep(sweep)
    return sweep


def begun(sweep: Sweep, name: str, step: str, word: Any, cause: str | None = None, job: str | None = None) -> Config:
    """Let a step of a point be in the state `word`; returns the point's settings."""
    point = next(point for point in sweep.points if point.name == name)
    work = work_of(sweep, point, step)
    started = status.start(work.status, work.settings, job)
    if word != "running":
        status.end(work.status, started, word, cause)
    run = point.config.run_folder
    save(point.config, run / "config.yaml")
    if word == "done" and step == "train":
        saved(run, STEPS)
    if word == "done" and step == "consolidate":
        (run / "model").mkdir()
        (run / "model" / MODEL).touch()
    if word == "done" and step.startswith("eval"):
        (run / "eval").mkdir(exist_ok=True)
        write_json(run / "eval" / "complete.json", {})
    return point.config


def submitted(sweep: Sweep, number: str = "77") -> dict[str, str]:
    """Record a batch of train jobs, one for each point; returns point -> job."""
    names = [point.name for point in sweep.points]
    write_batch(sweep, Batch("one", RELEASED, tuple(names), ("train",), {"train": number}))
    return {name: f"{number}_{index}" for index, name in enumerate(names)}


def logged(config: Config, steps: range, rate: float, loss: float = 2.0) -> None:
    """Let one process log the entries of these steps, at `rate` pairs a second, and a validation at the end."""
    monitor = Monitor(config.run_folder, steps.start)
    for step in steps:
        monitor.log(step, {"loss/total": loss, "pairs_per_second": rate})
    monitor.log(steps[-1], {"validation/clip_loss": 1.0})
    monitor.close()
