"""A run folder whose trained model is the oracle of `tests.support.cohort`, ready to be evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

from mama.data import report_text
from mama.data import tokenizer as tokens
from mama.data.held_out import Split
from mama.evaluate import evaluation
from mama.export.model_folder import FORMAT, HEADS, ModelFacts
from mama.run.files import write_digests, write_json
from mama.run.portable import MODEL
from mama.run.run_folder import shards_digest
from mama.settings.schema import Config, DataConfig, EvalConfig
from shards.read.manifest import load_manifest
from tests.support.cohort import SIZE, Oracle, write_shards


def oracle_config(folder: Path) -> Config:
    """Shards of 16 training and 12 test patients below `folder`, and a configuration that evaluates every task."""
    write_shards(folder / "shards", {"train": 16, "test": 12})
    data = DataConfig(shards=[str(folder / "shards")], image_size=SIZE, max_tokens=200, workers=0)
    measured = EvalConfig(
        tasks=["cancer", "malignancy", "birads", "density"], batch=5, bootstrap=50, intensity_baseline=True
    )
    return Config(name="oracle", runs=str(folder / "runs"), data=data, eval=measured)


def consolidated(config: Config, step: int) -> None:
    """A run folder that was trained on the shards of `config`, and weights of its own for each step."""
    (config.run_folder / "model").mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(Path(config.data.shards[0]))
    (config.run_folder / "data.json").write_text(json.dumps({"shards": shards_digest(manifest, {"train"})}))
    write_model(config.run_folder / "model", step)


def write_model(folder: Path, step: int) -> None:
    """What tells a model folder from others: its facts, weights of its own for each step, and their digests."""
    facts = ModelFacts(FORMAT, folder.parent.name, step, step, "of no checkpoint", "fp32", "merged", "0")
    write_json(folder / MODEL, vars(facts))
    save_file({"weight": np.full(1, step, np.float32)}, folder / HEADS)
    write_digests(folder)


def install_oracle(config: Config, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A trained model that knows everything, an untrained one that knows nothing."""
    items = Split(config, "train").items
    styles = get_args(report_text.Style)
    tokenizer = tokens.learn(
        (s for i in items for style in styles for s in report_text.text(i.study, i.view, style)), 400
    )
    model = Oracle(tokenizer)
    consolidated(config, step=240)
    monkeypatch.setattr(evaluation, "load_model", lambda folder, device, base: (model, tokenizer))
    monkeypatch.setattr(evaluation, "build", lambda config, tokenizer, *kernels: Oracle(tokenizer, blind=True))
    return model
