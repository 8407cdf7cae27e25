"""A model is not measured on patients that it was trained on: their hashes travel with it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors.numpy import load_file

from mama.errors import ConfigError
from mama.evaluate.evaluation import evaluate
from mama.export.trained_on import TRAINED_ON, read_trained_on
from mama.export.training_data import write_training_data
from mama.settings.schema import Config
from shards.pack.sample import Sample
from shards.schema import Study
from tests.support.cohort import Oracle, image, study
from tests.support.oracle_run import install_oracle, oracle_config
from tests.support.shard_folder import write_folder


def write(folder: Path, studies: dict[str, list[Study]]) -> str:
    jpeg = cv2.imencode(".jpg", image("A", False))[1].tobytes()
    samples = {split: [Sample(one, (jpeg, jpeg), ()) for one in of_split] for split, of_split in studies.items()}
    write_folder(folder, samples, per_shard=2)
    return str(folder)


def instances(one: Study, *names: str) -> Study:
    return replace(one, views=tuple(replace(v, instance=name) for v, name in zip(one.views, names, strict=True)))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run that was trained on ten patients."""
    config = oracle_config(tmp_path)
    train = [instances(study(n, "train"), f"{n}-left", f"{n}-right") for n in range(10)]
    own = write(tmp_path / "own", {"train": train, "test": [study(n, "test") for n in range(4)]})
    small = replace(config.eval, tasks=["cancer"], bootstrap=0, intensity_baseline=False)
    return replace(config, eval=small, data=replace(config.data, shards=[own]))


@pytest.fixture
def oracle(config: Config, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    model = install_oracle(config, monkeypatch)
    write_training_data(config, config.run_folder / "model")
    return model


def on(config: Config, *folders: str, **settings: str) -> Config:
    return replace(config, data=replace(config.data, shards=list(folders)), eval=replace(config.eval, **settings))  # type: ignore[arg-type]


def test_the_file_holds_the_training_patients_hashed_once_more(config: Config, oracle: Oracle) -> None:
    path = config.run_folder / "model" / TRAINED_ON
    found = load_file(path)
    expected = sorted(
        int(hashlib.sha256(b"mama trained on\0" + f"patienttrain{n}".encode()).hexdigest()[:16], 16) for n in range(10)
    )
    assert found["patients"].tolist() == expected
    assert len(found["images"]) == 20
    assert found["patients"].dtype == np.uint64
    assert b"patienttrain" not in path.read_bytes()
    known = read_trained_on(path.parent)
    assert known
    assert known.patients_among(["patienttrain3", "patienttest3"]) == {"patienttrain3"}
    assert known.patients_among([]) == set()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConfigError, match=r"trained_on\.safetensors: is damaged .*; run `mama consolidate` again$"):
        read_trained_on(path.parent)


def test_known_patients_and_images_are_refused_in_one_line(config: Config, oracle: Oracle, tmp_path: Path) -> None:
    """Another key hashes the same person to something else, so that only the image may tell; or only the person."""
    strangers = [study(n, "test") for n in range(20, 24)]
    known = replace(study(30, "test"), patient="patienttrain3")
    copied = instances(study(31, "test"), "new", "7-right")
    place = write(tmp_path / "abroad", {"test": [*strangers, known, copied]})
    with pytest.raises(ConfigError) as refused:
        evaluate(on(config, place), config.run_folder)
    assert str(refused.value) == (
        f"eval.known_patients: the model was trained on 1 of 6 patients and 3 of 12 images of the split test of "
        f"{place}; leave these shards out, name another eval.split, or allow it with eval.known_patients=allow"
    )
    assert not (config.run_folder / "eval-on").exists()
    found = evaluate(on(config, place, known_patients="allow"), config.run_folder)
    assert found["cancer"]["known"] == {"patients": 1, "images": 3}
    for alone in (known, copied):
        place = write(tmp_path / alone.key, {"test": [*strangers, alone]})
        with pytest.raises(ConfigError, match=r"^eval\.known_patients: "):
            evaluate(on(config, place), config.run_folder)
    clean = write(tmp_path / "clean", {"test": strangers, "val": [known]})
    assert evaluate(on(config, clean), config.run_folder)["cancer"]["known"] == {"patients": 0, "images": 0}
    with pytest.raises(ConfigError, match=f"1 of 1 patients and 2 of 2 images of the split val of {clean}"):
        evaluate(on(config, clean, split="val"), config.run_folder)


def test_the_splits_of_the_run_can_be_evaluated_and_an_older_model_too(
    config: Config, oracle: Oracle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever names the train split of the training shards means it; that of other shards may be a mistake."""
    for split in ("test", "train"):
        found = evaluate(on(config, *config.data.shards, split=split), config.run_folder)
        assert found["cancer"]["known"] == {"patients": 0, "images": 0}
    again = write(tmp_path / "again", {"train": [study(n, "train") for n in range(5)]})
    with pytest.raises(ConfigError, match="5 of 5 patients and 10 of 10 images of the split train"):
        evaluate(on(config, again, split="train"), config.run_folder)
    (config.run_folder / "model" / TRAINED_ON).unlink()
    assert evaluate(on(config, again, split="train"), config.run_folder)["cancer"]["known"] is None
    assert "whether it was trained on these patients is not checked" in caplog.text
