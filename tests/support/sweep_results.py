"""A sweep whose points have been evaluated: invented predictions, written by the evaluation's own writers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mama.data.held_out import Split
from mama.data.wording import wording_of
from mama.evaluate import provenance, result_folders, results
from mama.evaluate.task_data import Predictions, task_data
from mama.evaluate.tasks import load_tasks
from mama.run.files import write_json
from mama.settings.load import save
from mama.settings.schema import Config, DataConfig, EvalConfig
from mama.sweep.sweep import STAGES, Evaluation, Point, Sweep
from tests.support.cohort import SIZE, write_shards
from tests.support.oracle_run import consolidated

PROTOCOLS = ("zero-shot", "linear probe")


def sweep_config(folder: Path, patients: int = 12, resamples: int = 50) -> Config:
    """Shards below `folder`, and what all points share."""
    write_shards(folder / "shards", {"train": 8, "test": patients})
    data = DataConfig(shards=[str(folder / "shards")], image_size=SIZE, max_tokens=200, workers=0)
    return Config(runs=str(folder / "runs/study"), data=data, eval=EvalConfig(bootstrap=resamples))


def sweep_of(base: Config, differing: list[dict[str, Any]], baseline: dict[str, Any] | None = None) -> Sweep:
    """A sweep with a point for each of `differing`: values of the seed, of settings of `optim`, and of the recipe."""
    points = []
    for differs in differing:
        name = "_".join(f"{axis.rpartition('.')[2]}-{value}" for axis, value in differs.items())
        name = re.sub(r"[^\w.-]", "-", name)
        optim = {axis.removeprefix("optim."): value for axis, value in differs.items() if axis.startswith("optim.")}
        config = replace(base, name=name, seed=differs.get("seed", 42), optim=replace(base.optim, **optim))
        points.append(Point(config, differs))
    folder = Path(base.runs)
    return Sweep("study", folder, points, list(STAGES[2:]), [Evaluation("eval")], baseline=baseline or {})


def evaluated(point: Point, skill: float, **environment: Any) -> Path:
    """Write what training and evaluation leave of a point; returns the folder of its results.

    The larger `skill`, the more is right. What is hard is so for all points, and each point has noise of its own.
    """
    config, run = point.config, point.config.run_folder
    run.mkdir(parents=True, exist_ok=True)
    save(config, run / "config.yaml")
    write_json(run / "point.json", {"sweep": "study", "differs": point.differs})
    versions = {"mama-clip": "0.1.0", "torch": "2.13.0"}
    write_json(
        run / "environment.json",
        {"python": "3.11", "platform": "Linux", "commit": "0123456789abcdef", "versions": versions} | environment,
    )
    consolidated(config, step=240)
    return write_evaluation(config, skill)


def write_evaluation(config: Config, skill: float) -> Path:
    """Evaluate the run of `config` by invention."""
    run = config.run_folder
    measured = provenance.identity(config, run)
    held_out, train = (Split(config, split).items for split in (config.eval.split, "train"))
    wording = wording_of([item.study for item in held_out if item.position == 0], config.data.style, False)
    tasks = [task_data(task, held_out, train, [], wording) for task in load_tasks(config.eval.tasks)]
    hard, own = np.random.default_rng(1), np.random.default_rng([config.seed, round(1000 * skill)])
    for data in tasks:
        for protocol in PROTOCOLS:
            shape = (len(data.rows), len(data.classes))
            common, noise = hard.normal(size=shape), own.normal(size=shape)
            for model, right in (("trained", skill), ("untrained", 0.0)):
                logits = right * np.eye(shape[1])[data.labels] + common + 0.4 * noise
                scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
                data.predictions.append(Predictions(protocol, model, scores))
    documents = {
        data.task.name: measured | results.document(data, held_out, config.eval.split, config) for data in tasks
    }
    rate = {"low": 0.1, "high": 0.9, "resamples": 50, "reason": None}
    shares = {"hit_rate": skill / 4, "strict_hit_rate": skill / 8, "box_auc": skill / 3}
    figures = {name: {**rate, "value": share} for name, share in shares.items()}
    pointing = {"findings": 6, "patients": 6, "rows": [{"model": "trained", **figures}], "examples": []}
    documents["alignment"] = measured | pointing
    folder = result_folders.folder_of(measured["shards"], run)
    with result_folders.replaced_results(folder) as new:
        results.write(documents, tasks, held_out, measured, np.zeros((0, 1, 1), np.float32), new)
        result_folders.finish(config, measured, folder, new)
    return folder
