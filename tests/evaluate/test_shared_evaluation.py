"""Real ranks that share an evaluation write the files of one process; the end of one ends all."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from mama.errors import RankError
from mama.evaluate import evaluation
from mama.evaluate.evaluation import evaluate
from mama.export.consolidate import consolidate
from mama.run.files import remove
from mama.runtime.collectives import rank
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, EvalConfig
from shards.errors import ShardError
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of

pytestmark = pytest.mark.ranks


def files(config: Config) -> dict[str, bytes]:
    """Every result of a run, by its path in the run folder."""
    folders = (config.run_folder / name for name in ("eval", "eval-on"))
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(config.run_folder)): path.read_bytes() for path in found}


def on_ranks(ranks: int, function: Callable[[Config], object], config: Config) -> object:
    train = replace(config.train, ranks=ranks, micro_batch=1, global_batch=ranks)
    return run_on_ranks(function, replace(config, train=train))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A consolidated run, with 18 images to train on and 14 to test on."""
    folder = tmp_path_factory.mktemp("shared")
    write_shards(folder / "shards", {"train": 9, "test": 7})
    config = config_of(folder, "whole")
    tasks = ["cancer", "malignancy", "birads", "density"]
    measured = EvalConfig(tasks=tasks, batch=2, bootstrap=20, intensity_baseline=True)
    text = replace(config.text, config=config.text.config | {"n_positions": 256})
    config = replace(config, eval=measured, text=text, data=replace(config.data, workers=0, max_tokens=200))
    save_run(config)
    consolidate(config)
    return config


def cases_of(run: Config) -> list[Config]:
    """9 batches of training images, 7 of test images, 2 of findings; a single one; or less images than ranks."""
    without = replace(run, name="no-local-term", loss=replace(run.loss, local=0.0))
    save_run(without)
    consolidate(without)
    few = Path(run.data.shards[0]).parent / "few"
    write_shards(few, {"train": 2, "test": 1})
    return [
        run,
        replace(run, eval=replace(run.eval, batch=64)),
        replace(run, eval=replace(run.eval, split="train", intensity_baseline=False)),
        replace(run, data=replace(run.data, shards=[str(few)], workers=1), eval=replace(run.eval, batch=1)),
        without,
    ]


def evaluate_all(cases: list[Config], config: Config) -> list[dict[str, bytes]]:
    found = []
    for case in cases:
        results = evaluate(case, case.run_folder)
        assert bool(results) == (os.environ.get("RANK", "0") == "0")
        if results:
            found.append(files(case))
            for name in ("eval", "eval-on"):
                remove(case.run_folder / name)
    return found


def test_ranks_write_what_one_process_writes(run: Config) -> None:
    cases = cases_of(run)
    alone = evaluate_all(cases, run)
    assert [len(each) for each in alone] == [12, 12, 12, 12, 12]
    assert b"31 intensity percentiles" in alone[0]["eval/cancer/predictions.csv"]
    with np.load(io.BytesIO(alone[0]["eval/alignment/maps.npz"])) as maps:
        assert maps["maps"].shape[0] == 3
    for ranks in (2, 3):
        assert on_ranks(ranks, partial(evaluate_all, cases), run) == alone


def raising(number: int, config: Config) -> str:
    """What rank 0 says if rank `number` cannot read an image."""
    read = evaluation.linear_probe.intensity_percentiles

    def read_or_raise(*arguments: object) -> object:
        if rank() == number:
            raise ShardError("invented.tar: damaged\nin two lines")
        return read(*arguments)  # type: ignore[arg-type]

    with patch.object(evaluation.linear_probe, "intensity_percentiles", read_or_raise):
        try:
            evaluate(config, config.run_folder)
        except (RankError, ShardError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_raises_ends_all_with_its_message(run: Config) -> None:
    before = files(run)
    said = on_ranks(3, partial(raising, 2), run)
    host = socket.gethostname()
    assert said == f"RankError: rank 0 ends as well: rank 2 on {host}: invented.tar: damaged in two lines"
    assert str(on_ranks(2, partial(raising, 0), run)).startswith("ShardError: invented.tar")
    assert files(run) == before
