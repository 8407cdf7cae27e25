"""Weighted draws: which images, how often, and that it is a function of the global index alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mama.data.images import Images
from mama.data.pairs import Pairs
from mama.data.sample_weights import sampling_probabilities
from mama.errors import ConfigError
from mama.settings.schema import DataConfig
from shards.errors import ShardError
from shards.pack.sample import Sample
from shards.read.labels import labels_of
from shards.read.reader import ShardReader
from shards.schema import Labels
from tests.support.letter_shards import STORED, config_of, study_of
from tests.support.shard_folder import write_folder

PICTURE = cv2.imencode(".jpg", np.full(STORED, 90, np.uint8))[1].tobytes()
NOTHING = Labels()
FIRST = [  # the labels of each image, study by study
    [Labels(2, "A", False), Labels(2, "A", False), Labels(4, "A", True)],
    [Labels(2, "B", False)],
    [Labels(None, "C"), NOTHING],
    [Labels(0, "D", False), Labels(2, "D", False)],
]
SECOND = [[Labels(5, None, True)], [NOTHING], [Labels(5, None, True), Labels(1, None, False)]]


def write(folder: Path, studies: list[list[Labels]], split: str = "train") -> Path:
    samples = []
    for number, labels in enumerate(studies):
        study = study_of("L" * len(labels), f"{folder.name}{number}", split)
        views = tuple(replace(view, labels=label) for view, label in zip(study.views, labels, strict=True))
        samples.append(Sample(replace(study, views=views), (PICTURE,) * len(labels), ()))
    write_folder(folder, {split: samples}, per_shard=2)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("sampling")
    return str(write(root / "first", FIRST)), str(write(root / "second", SECOND))


def data_of(folders: tuple[str, ...], cache: Path, **settings: Any) -> DataConfig:
    return DataConfig(list(folders), cache=str(cache), **settings)


def chances_of(config: DataConfig) -> list[float] | None:
    found = sampling_probabilities(Images(config, "train"), config)
    return None if found is None else found.tolist()


def test_without_either_setting_nothing_is_weighed(folders: tuple[str, str], tmp_path: Path) -> None:
    config = data_of(folders, tmp_path / "cache")
    assert chances_of(config) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "expected"),  # of the eight images of the first set and the four of the second, times 120
    [
        ({"balance": "birads"}, [6, 6, 24, 6, 0, 0, 24, 6, 12, 0, 12, 24]),
        ({"balance": "density"}, [10, 10, 10, 30, 30, 0, 15, 15, 0, 0, 0, 0]),
        ({"balance": "cancer"}, [10, 10, 20, 10, 0, 0, 10, 10, 20, 0, 20, 10]),
        ({"shard_weights": [1, 3]}, [3.75] * 8 + [22.5] * 4),
        ({"shard_weights": [0, 0.5]}, [0] * 8 + [30] * 4),
        ({"shard_weights": [2, 2], "balance": "cancer"}, [6, 6, 30, 6, 0, 0, 6, 6, 15, 0, 15, 30]),
        ({"shard_weights": [1, 0], "balance": "density"}, [10, 10, 10, 30, 30, 0, 15, 15, 0, 0, 0, 0]),
    ],
)
def test_each_class_and_each_set_has_its_share(
    folders: tuple[str, str], tmp_path: Path, settings: dict[str, Any], expected: list[float]
) -> None:
    found = chances_of(data_of(folders, tmp_path, **settings))
    assert found == pytest.approx([share / 120 for share in expected])


def test_images_are_drawn_as_often_as_they_should_be(folders: tuple[str, str], tmp_path: Path) -> None:
    config = config_of(*map(Path, folders), balance="birads", cache=str(tmp_path), image_size=(6, 4))
    pairs, draws = Pairs(config), 3000
    counts = Counter(pairs[g].key for g in range(draws))
    studies = [
        (f"{name}{n}", labels) for name, all_ in (("first", FIRST), ("second", SECOND)) for n, labels in enumerate(all_)
    ]
    expected = [6, 6, 24, 6, 0, 0, 24, 6, 12, 0, 12, 24]
    for share, key in zip(
        expected, [f"{key}/{v}.jpg" for key, labels in studies for v in range(len(labels))], strict=True
    ):
        p = share / 120
        assert abs(counts[key] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5, key
    again = Pairs(config)
    assert [again[g].key for g in (2999, 7, 1500)] == [pairs[g].key for g in (2999, 7, 1500)]
    other = Pairs(replace(config, seed=2))
    assert [other[g].key for g in range(20)] != [pairs[g].key for g in range(20)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"balance": "density", "shard_weights": [1, 2]},
            r"data\.shard_weights: 2 for .*second, which has no training image with the label density; .*the weight 0",
        ),
        ({"shard_weights": [1]}, r"data\.shard_weights: \[1\] has 1 weights, but data\.shards has 2 entries"),
        ({"shard_weights": [0, 0]}, r"data\.shard_weights: \[0, 0\] holds no weight above 0.*"),
    ],
)
def test_weights_that_cannot_be_kept_are_one_line(
    folders: tuple[str, str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        chances_of(data_of(folders, tmp_path, **settings))


def test_a_label_that_no_image_has_is_one_line(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.balance: no training image has the label density; .*$"):
        chances_of(data_of(folders[1:], tmp_path, balance="density"))
    only_val = write(tmp_path / "val", FIRST, "val")
    with pytest.raises(ConfigError, match=r"^data\.shard_weights: 1 for .*val, which has no training image; .*$"):
        chances_of(data_of((folders[0], str(only_val)), tmp_path, shard_weights=[1, 1]))


# Reading the labels


def test_labels_are_those_of_the_images_and_are_read_from_the_tars_only_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "shards", FIRST)
    expected = [labels for study in FIRST for labels in study]
    assert labels_of(ShardReader(folder, "train"), tmp_path / "cache") == expected
    for tar in folder.glob("*.tar"):
        tar.unlink()
    assert labels_of(ShardReader(folder, "train"), tmp_path / "cache") == expected
    assert labels_of(ShardReader(folder, "val"), tmp_path / "cache") == []


def test_facts_that_cannot_be_read_end_the_run_and_are_not_kept(tmp_path: Path) -> None:
    """One rank may fail to read what the others can: with other labels it would draw other images."""
    folder = write(tmp_path / "shards", FIRST)
    reader = ShardReader(folder, "train")
    tar = folder / "train-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(b'"birads": 4', b'"birads": 9'))
    with pytest.raises(ShardError, match=r"^.*train-000000\.tar: birads: 9 is not one of 0\.\.6; run `mama check .*`$"):
        labels_of(reader, tmp_path / "cache")
    tar.write_bytes(whole)
    assert labels_of(ShardReader(folder, "train"), tmp_path / "cache") == [label for s in FIRST for label in s]


@pytest.mark.parametrize("damage", ["[[2, ", "[]", "[[9, null, null, null]]"])
def test_kept_labels_that_were_damaged_are_not_believed(tmp_path: Path, damage: str) -> None:
    reader = ShardReader(write(tmp_path / "shards", FIRST), "train")
    labels_of(reader, tmp_path / "cache")
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text(damage)
    with pytest.raises(ShardError, match=r"^.*\.json: was edited or damaged; delete it and run again$"):
        labels_of(reader, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    reader = ShardReader(write(tmp_path / "shards", FIRST), "train")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ShardError, match=r"^.*cannot be written \(.*\); set another folder for the cache$"):
        labels_of(reader, tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "expected"),  # images of the first set by their labels; exams of even number have a reason
    [
        ({"require": ["density"]}, [0, 1, 2, 3, 4, 6, 7]),
        ({"require": ["density", "cancer", "reason"]}, [0, 1, 2]),
        ({"require": ["birads"], "shard_weights": [1]}, [0, 1, 2, 3, 6, 7]),
        ({"require": ["reason"], "balance": "cancer"}, [0, 1, 2]),  # the other exam with a reason is not labelled
    ],
)
def test_an_image_without_a_required_fact_is_no_anchor(
    folders: tuple[str, str], tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    """Each of the others once an epoch; the partner may be any; and the order hangs on the index alone."""
    studies = [ShardReader(folders[0], "train").study(n) for n in range(len(FIRST))]
    write_folder(tmp_path / "some", {"train": [
        Sample(replace(study, reason="screening" if n % 2 == 0 else None), (PICTURE,) * len(study.views), ())
        for n, study in enumerate(studies)]}, per_shard=2)  # fmt: skip
    config = config_of(tmp_path / "some", cache=str(tmp_path / "cache"), image_size=(6, 4), pairs=["study"], **settings)
    pairs = Pairs(config)
    drawn = [pairs[g].key for g in range(20 * len(expected))]
    keys = [f"{study.key}/{view.member}" for study in studies for view in study.views]
    assert {keys.index(key) for key in drawn} == set(expected)
    if len(settings) == 1:
        assert set(Counter(drawn).values()) == {20}
        assert [Counter(drawn[: len(expected)])[keys[n]] for n in expected] == [1] * len(expected)
    assert [Pairs(config)[g].key for g in (7, 3, 5)] == [drawn[g] for g in (7, 3, 5)]


def test_a_fact_that_no_image_has_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.require: no training image has density and reason; require less"):
        Pairs(config_of(Path(folders[0]), cache=str(tmp_path), require=["density", "reason"]))
    with pytest.raises(ConfigError, match=r"data\.require: 'sex' is not one of density, birads, cancer, pathology, re"):
        DataConfig(require=["sex"])
