"""Real ranks that share an evaluation write the files of one process; the end of one ends all."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mama.data.held_out import Split
from mama.errors import ConfigError, RankError
from mama.evaluate import linear_probe
from mama.evaluate.arrays import Float64s
from mama.evaluate.evaluation import evaluate
from mama.export.classifier_folder import Named, save_classifier
from mama.export.consolidate import consolidate
from mama.export.model_card import CARD
from mama.model.classifier import Classifier
from mama.model.mama_model import build
from mama.run.files import remove
from mama.run.run_tokenizer import load_tokenizer
from mama.runtime import sharing
from mama.runtime.collectives import rank
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.read.manifest import MANIFEST
from tests.support.cohort import write_shards
from tests.support.saved_run import results_of, save_run, small_run

pytestmark = pytest.mark.ranks


def on_ranks(ranks: int, function: Callable[[Config], object], config: Config) -> object:
    train = replace(config.train, ranks=ranks, micro_batch=1, global_batch=ranks)
    return run_on_ranks(function, replace(config, train=train))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = small_run(tmp_path_factory.mktemp("shared"))
    consolidate(config)
    return config


def cases_of(run: Config) -> list[Config]:
    """Batches that do not divide over the ranks; a single one; the training split; no finding; few images.

    The first has a fine-tuned classifier as well, the second a detector; the third is by the paper's protocol.
    """
    classifier = Classifier(build(run, load_tokenizer(run.run_folder), "mama_sdpa").vision, 2)
    torch.nn.init.ones_(classifier.head.weight[0])
    place = run.run_folder / "finetune" / "cancer-100-0" / "classifier"
    save_classifier(Named(classifier, ["no cancer", "cancer"]), run.run_folder / "model", place)
    tuned = replace(run, eval=replace(run.eval, protocols=["zeroshot", "probe", "finetune"]))
    without = replace(run, name="no-local-term", loss=replace(run.loss, local=0.0))
    save_run(without)
    consolidate(without)
    boxes = run.run_folder / "detector.csv"
    boxes.write_text("image,x0,y0,x1,y1,score\ntest001/0.jpg,16,24,24,32,0.5\n")
    few = Path(run.data.shards[0]).parent / "few"
    write_shards(few, {"train": 2, "test": 1})
    return [
        tuned,
        replace(run, eval=replace(run.eval, batch=64, boxes=[str(boxes)])),
        replace(run, eval=replace(run.eval, split="train", intensity_baseline=False, protocol="paper")),
        without,
        replace(run, data=replace(run.data, shards=[str(few)]), eval=replace(run.eval, batch=1)),
    ]


def evaluate_all(cases: list[Config], config: Config) -> list[dict[str, bytes]]:
    found = []
    for case in cases:
        results = evaluate(case, case.run_folder)
        assert bool(results) == (os.environ.get("RANK", "0") == "0")
        if results:
            found.append(results_of(case) | {"card": (case.run_folder / "model" / CARD).read_bytes()})
            for name in ("eval", "eval-on", "features"):
                remove(case.run_folder / name)
    return found


def evaluate_again(config: Config) -> list[dict[str, bytes]]:
    """With features of the first time, of which one file is damaged: the ranks agree on what to compute."""
    found = []
    for _ in range(2):
        if evaluate(config, config.run_folder):
            found.append(results_of(config))
            for damaged in (config.run_folder / "features").glob("test-*-trained-images.npz"):
                damaged.write_bytes(b"damaged")
    return found


def test_ranks_write_what_one_process_writes(run: Config) -> None:
    cases = cases_of(run)
    alone = evaluate_all(cases, run)
    assert [len(each) for each in alone] == [30, 30, 30, 30, 30]
    assert b"31 intensity percentiles" in alone[0]["eval/cancer/predictions.csv"]
    assert b'"model": "detector"' in alone[1]["eval/alignment/metrics.json"]
    apart = [json.loads(each["eval/alignment/metrics.json"])["local_retrieval"] for each in alone[:2]]
    normal = sum(not item.view.findings for item in Split(run, "test").items)
    assert [(one["targets"], one["lesion_free"], len(one["rows"])) for one in apart] == [(3, normal, 5)] * 2
    assert b"fine-tune" in alone[0]["eval/cancer/predictions.csv"]
    assert [b"| cancer | fine-tune |" in each["card"] for each in alone[:3]] == [True, False, False]
    with np.load(io.BytesIO(alone[0]["eval/alignment/maps.npz"])) as maps:
        assert maps["maps"].shape[0] == 3
    assert on_ranks(2, partial(evaluate_all, cases), run) == alone
    assert on_ranks(3, partial(evaluate_all, cases[:2] + cases[-1:]), run) == alone[:2] + alone[-1:]


def test_ranks_agree_on_which_features_are_read(run: Config) -> None:
    found = on_ranks(2, evaluate_again, run)
    assert isinstance(found, list)
    assert found[0] == found[1]
    for name in ("eval", "features"):
        remove(run.run_folder / name)


def troubled(troubles: list[Callable[[Config], Config]], config: Config) -> list[str]:
    """What rank 0 says of each trouble."""
    said = []
    read = linear_probe.intensity_percentiles
    for trouble in troubles:
        with patch.object(linear_probe, "intensity_percentiles", read):
            try:
                evaluate(trouble(config), config.run_folder)
            except (ConfigError, RankError, ShardError) as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def unreadable_on(number: int, config: Config) -> Config:
    read = linear_probe.intensity_percentiles

    def read_or_raise(image: NDArray[np.uint8]) -> Float64s:
        if rank() == number:
            raise ShardError("invented.tar: damaged\nin two lines")
        return read(image)

    linear_probe.intensity_percentiles = read_or_raise  # put back by `troubled`
    return config


def other_settings(config: Config) -> Config:
    return replace(config, seed=int(os.environ["RANK"]))


def other_shards(config: Config) -> Config:
    """As on a disk that the nodes do not share."""
    if os.environ["RANK"] == "0":
        return config
    folder = Path(tempfile.mkdtemp()) / "shards"
    shutil.copytree(config.data.shards[0], folder)
    patch("mama.evaluate.provenance.local_folder", lambda address, cache: folder).start()
    file = folder / MANIFEST
    file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0'))
    return config


def test_the_end_of_one_rank_is_the_end_of_all_in_one_line(run: Config) -> None:
    before = results_of(run)
    troubles: list[Callable[[Config], Config]] = [
        partial(unreadable_on, 2),
        partial(unreadable_on, 0),
        other_settings,
        other_shards,
    ]
    said = on_ranks(3, partial(troubled, troubles), run)
    host = socket.gethostname()
    assert isinstance(said, list)
    assert said[:3] == [
        f"RankError: rank 0 ends as well: rank 2 on {host}: invented.tar: damaged in two lines",
        "ShardError: invented.tar: damaged\nin two lines",
        f"ConfigError: seed: rank 1 on {host} sees 1, rank 0 on {host} 0; all ranks of a launcher share one call",
    ]
    assert re.match(rf"ConfigError: shards: rank 1 on {host} sees \w+, rank 0 on {host} \w+; ", said[3])
    assert results_of(run) == before


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> int:
    """The variables of a rank whose partner does not come; returns its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **place}.items():
        monkeypatch.setenv(name, value)
    return port


def test_a_partner_that_does_not_come_is_one_line(first_of_two: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "JOIN", 1.0)
    where = rf"^rank 0 of 2 on \S+ does not find the others at 127\.0\.0\.1:{first_of_two}: "
    with pytest.raises(RankError, match=where + "[^\n]*1/2 clients joined"), sharing.joined():
        pass
    with socket.socket() as occupied:
        occupied.bind(("", first_of_two))
        occupied.listen()
        with pytest.raises(RankError, match=where + "[^\n]*EADDRINUSE[^\n]*$"), sharing.joined():
            pass


def test_an_interrupt_ends_a_rank_that_waits_for_its_partner(first_of_two: int) -> None:
    program = "from mama.runtime import sharing\nwith sharing.joined(): pass"
    waiting = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", first_of_two)):
        assert waiting.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=180) == (None, "")
    assert waiting.returncode == -signal.SIGINT
