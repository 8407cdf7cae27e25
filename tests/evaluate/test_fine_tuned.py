"""Predictions of fine-tuned classifiers: the right images, the right columns, on the split val too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mama.data.augment import normalise
from mama.data.held_out import Split
from mama.data.wording import Wording
from mama.evaluate import provenance
from mama.evaluate.fine_tuned import Tuning, add_predictions, folder_of
from mama.evaluate.task_data import task_data
from mama.evaluate.tasks import load_task
from mama.export.classifier_folder import Named, save_classifier
from mama.export.consolidate import consolidate
from mama.model.classifier import Classifier
from mama.settings.schema import Config
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_model import model_of
from tests.support.tiny_run import config_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_shards(tmp_path / "shards", {"train": 8, "val": 3, "test": 5})
    base = config_of(tmp_path, "tuned")
    measured = replace(base.eval, batch=3, fractions=[0.1, 1.0], tasks=["density"])
    config = replace(base, eval=measured, data=replace(base.data, workers=0))
    save_run(config)
    consolidate(config)
    return config


def test_each_class_gets_its_column_and_one_that_the_labels_lacked_gets_nothing(config: Config) -> None:
    run, shards = config.run_folder, provenance.shard_set(config)
    torch.manual_seed(0)
    model = Classifier(model_of(config).vision, 3).eval()
    torch.nn.init.normal_(model.head.weight)
    place = folder_of(shards, run) / Tuning("density", 0.1, 0).name
    save_classifier(Named(model, ["D", "A", "B"]), run / "model", place / "classifier")
    splits = {name: Split(config, name) for name in ("train", "val", "test")}
    items = {name: split.items for name, split in splits.items()}
    data = task_data(load_task("density"), items["test"], items["train"], items["val"], Wording())
    data.rows, data.labels = data.rows[1::2], data.labels[1::2]  # as a task that leaves out images
    add_predictions([data], splits["test"], splits["val"], shards, config, run)
    (found,) = data.predictions
    assert (found.protocol, found.model, found.fraction, found.draw) == ("fine-tune", "trained", 0.1, 0)
    assert found.val_scores is not None
    for scores, rows, name in ((found.scores, data.rows, "test"), (found.val_scores, data.val_rows, "val")):
        with torch.inference_mode():
            pixels = torch.stack([splits[name][int(row)][0] for row in rows])
            expected = model(normalise(pixels)).softmax(1).double().numpy()
        assert scores.shape == (len(rows), 4)
        assert np.abs(scores[:, [3, 0, 1]] - expected).max() < 1e-6
        assert np.all(scores[:, 2] == 0)


def test_other_shards_have_folders_of_their_own(config: Config, tmp_path: Path) -> None:
    write_shards(tmp_path / "elsewhere", {"train": 2, "test": 2})
    other = replace(config, data=replace(config.data, shards=[str(tmp_path / "elsewhere")]))
    shards = provenance.shard_set(other)
    assert folder_of(provenance.shard_set(config), config.run_folder) == config.run_folder / "finetune"
    found = folder_of(shards, config.run_folder)
    assert found.parent == config.run_folder / "finetune-on"
    assert found.name.startswith("elsewhere-")
    assert (
        folder_of(provenance.shard_set(replace(other, eval=replace(other.eval, split="val"))), config.run_folder)
        == found
    ), "what is evaluated does not matter"
