"""Which images a fine-tuning sees how often, with which label, and that no other split's labels are among them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mama.data.held_out import Split
from mama.data.images import Images
from mama.errors import ConfigError
from mama.evaluate.fine_tuned import Tuning
from mama.evaluate.tasks import load_task
from mama.finetune.images import LabelledImages, collate
from mama.finetune.labels import items_of, labels_of
from mama.settings.schema import Config, DataConfig, FinetuneConfig
from tests.support.cohort import SIZE, write_shards


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("labelled") / "shards"
    write_shards(folder, {"train": 16, "val": 6, "test": 4})
    return Config(data=DataConfig(shards=[str(folder)], image_size=SIZE, workers=0))


def images_of(config: Config, task: str = "cancer", fraction: float = 1.0) -> LabelledImages:
    labels = labels_of(Tuning(task, fraction, 0), items_of(config, "train"), [], config)
    assert labels is not None
    return LabelledImages(config, labels)


def test_balanced_sampling_draws_every_class_equally_often_and_its_images_alike(config: Config) -> None:
    images = images_of(config)  # 8 of 32 images show a cancer
    assert Counter(images.labels.labels.tolist()) == {0: 24, 1: 8}
    places = np.array([images.place(index) for index in range(4000)])
    drawn = images.labels.labels[places]
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    for k in (0, 1):
        counts = np.bincount(places[drawn == k], minlength=32)[images.labels.labels == k]
        expected = 2000 / len(counts)
        assert np.abs(counts - expected).max() < 5 * expected**0.5
    assert [images.place(index) for index in range(100)] == places[:100].tolist(), "a function of the index alone"


def test_natural_sampling_draws_each_image_once_an_epoch(config: Config) -> None:
    images = images_of(replace(config, finetune=FinetuneConfig(sampling="natural")))
    epochs = [[images.place(index) for index in range(start, start + 32)] for start in (0, 32)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(32))] * 2
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("task", ["cancer", "density", "birads"])
def test_a_sample_has_the_pixels_and_the_label_of_one_training_image(config: Config, task: str) -> None:
    images = images_of(config, task, fraction=0.5)
    train, stored = Split(config, "train"), Images(config.data, "train")
    drawn = {train.items[row].study.patient for row in images.labels.rows}
    assert len(drawn) == images.labels.patients == 8
    batch = collate([images[index] for index in range(40)])
    for n, key in enumerate(batch.keys):
        study, _, view = key.partition("/")
        (item,) = [i for i in train.items if i.study.key == study and i.position == int(view)]
        assert item.study.patient in drawn
        true = load_task(task).label_of(item.study, item.view)
        assert true is not None
        assert images.labels.classes[batch.labels[n]] == load_task(task).names[true]
        assert np.array_equal(batch.images[n, 0].numpy(), stored.pixels(item.number, item.position, SIZE))


def test_labels_of_the_split_val_choose_the_step_and_train_nothing(config: Config) -> None:
    train, val = items_of(config, "train"), items_of(config, "val")
    watched = replace(config, finetune=FinetuneConfig(validate_every=5))
    plain = labels_of(Tuning("cancer", 0.5, 0), train, [], config)
    with_val = labels_of(Tuning("cancer", 0.5, 0), train, val, watched)
    assert plain is not None
    assert with_val is not None
    for name in ("rows", "labels"):
        assert np.array_equal(getattr(plain, name), getattr(with_val, name))
    assert plain.counts() == with_val.counts()
    assert len(plain.val_rows) == 0
    assert [with_val.classes[k] for k in with_val.val_labels] == [
        load_task("cancer").names[int(bool(val[row].view.labels.cancer))] for row in with_val.val_rows
    ]
    with pytest.raises(ConfigError, match="no image of the split 'val' has a label of cancer"):
        labels_of(Tuning("cancer", 0.5, 0), train, [], watched)


def test_one_class_is_nothing_to_learn(config: Config) -> None:
    healthy = [item for item in items_of(config, "train") if not item.view.labels.cancer]
    assert labels_of(Tuning("cancer", 1.0, 0), healthy, [], config) is None
