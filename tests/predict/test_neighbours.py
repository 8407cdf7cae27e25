from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mama.data import report_text
from mama.data.augment import normalise
from mama.data.tokenizer import learn
from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s
from mama.export.trained_on import TrainedOn, hashes
from mama.predict.neighbours import COUNT, Archive, _unknown, embed_archive
from mama.predict.seen import Seen
from mama.settings.schema import Config, DataConfig
from shards.schema import Study
from tests.support.cohort import SIZE, Oracle, image, write_shards

CPU = torch.device("cpu")


@pytest.fixture
def studies(tmp_path: Path) -> list[Study]:
    return write_shards(tmp_path / "shards", {"train": 6, "test": 12})


@pytest.fixture
def model(studies: list[Study]) -> Oracle:
    return Oracle(learn((s for one in studies for s in report_text.text(one, one.views[0], "report")), 400))


def archive(model: Oracle, folder: Path, trained: TrainedOn | None) -> Archive:
    config = Config(data=DataConfig(shards=["elsewhere"], image_size=SIZE, workers=0))
    return embed_archive(model, config, [str(folder / "shards")], trained, CPU)  # type: ignore[arg-type]


def trained_on(studies: list[Study]) -> TrainedOn:
    return TrainedOn(np.unique(hashes({one.patient for one in studies})), np.array([], np.uint64), [])


def seen_of(pixels: np.ndarray, view: str | None = "CC", patient: str | None = None) -> Seen:
    return Seen(patient, "L", view, pixels, pixels, SIZE, (1, 0, 0, 0, 1, 0), False)


def embedding(model: Oracle, pixels: np.ndarray) -> Float32s:
    return model.embed_images(normalise(torch.from_numpy(pixels)[None, None]))[0][0].numpy()


def test_neighbours_are_the_nearest_of_patients_that_the_model_does_not_know(
    tmp_path: Path, studies: list[Study], model: Oracle
) -> None:
    train = [one for one in studies if one.split == "train"]
    known = [*train, studies[7]]  # test001: density A with cancer, nearest to the image below
    assert (known[-1].split, known[-1].views[0].labels.cancer) == ("test", True)
    found = archive(model, tmp_path, trained_on(known))
    patients = {one.patient for one in known}
    assert len(found.items) == 2 * 11
    assert not patients & {item.study.patient for item in found.items}
    pixels = image("A", True)
    near = found.nearest(seen_of(pixels), embedding(model, pixels))
    assert len(near) == COUNT
    by_key = {item.key: item for item in found.items}
    assert len({by_key[one.key].study.patient for one in near}) == COUNT
    assert near[0].facts[:2] == ["L CC", "density A"]
    assert "malignant" in near[0].facts
    assert near[0].cosine == pytest.approx(1)
    assert [one.cosine for one in near] == sorted((one.cosine for one in near), reverse=True)
    np.testing.assert_allclose(near[0].pixels, pixels, atol=12)
    # Without that image's own patient, and none of another view.
    own = by_key[near[0].key].study.patient
    near = found.nearest(seen_of(pixels, patient=own), embedding(model, pixels))
    assert own not in {by_key[one.key].study.patient for one in near}
    assert found.nearest(seen_of(pixels, view="MLO"), embedding(model, pixels)) == []
    assert len(found.nearest(seen_of(pixels, view=None), embedding(model, pixels))) == COUNT


def test_the_words_of_another_patients_report_are_not_shown(
    tmp_path: Path, studies: list[Study], model: Oracle
) -> None:
    found = archive(model, tmp_path, trained_on(studies[:6]))
    items = [
        replace(
            one, study=replace(one.study, views=tuple(replace(v, report="Like her mother's.") for v in one.study.views))
        )
        for one in found.items
    ]
    near = replace(found, items=items).nearest(seen_of(found.splits[0].pixels(items[0])), found.embeddings[0])
    assert near
    assert not [one for one in near if "mother" in " ".join(one.facts)]


def test_nothing_to_compare_with_is_an_error(tmp_path: Path, studies: list[Study], model: Oracle) -> None:
    with pytest.raises(ConfigError, match=r"^--neighbours: the model was trained on every patient of [^\n]*shards"):
        archive(model, tmp_path, trained_on(studies))
    with pytest.raises(ConfigError, match=r"^--neighbours: the model has no trained_on\.safetensors"):
        archive(model, tmp_path, None)


def test_an_image_that_was_trained_on_under_another_patient_is_left_out(
    tmp_path: Path, studies: list[Study], model: Oracle
) -> None:
    found = archive(model, tmp_path, trained_on(studies[:6]))
    item = found.items[0]
    view = replace(item.view, instance="abc")
    twin = replace(item, study=replace(item.study, views=(view, *item.study.views[1:])))
    trained = TrainedOn(np.array([], np.uint64), hashes(["abc"]), [])
    assert _unknown([twin, found.items[1]], trained) == [1]
