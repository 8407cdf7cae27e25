"""`texts.json`: the wording and the statements of the training texts, gathered in the pass that finds the patients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

from mama.data import report_text
from mama.data.images import Images
from mama.data.wording import Wording, training_statements, wording_of
from mama.errors import ConfigError
from mama.export.trained_on import read_trained_on
from mama.export.training_data import write_training_data
from mama.export.training_texts import FEWEST_PATIENTS, TEXTS, TrainingTexts, read_training_texts
from mama.settings.schema import Config, DataConfig
from shards.errors import ShardError
from shards.pack.sample import Sample
from shards.schema import Labels, Study
from tests.support.cohort import image, study
from tests.support.shard_folder import write_folder


def config_of(folder: Path, studies: list[Study], **data: object) -> Config:
    jpeg = cv2.imencode(".jpg", image("A", False))[1].tobytes()
    write_folder(folder / "shards", {"train": [Sample(one, (jpeg, jpeg), ()) for one in studies]}, per_shard=4)
    return Config(data=DataConfig(shards=[str(folder / "shards")], **data))  # type: ignore[arg-type]


def texts_of(folder: Path, config: Config) -> TrainingTexts:
    write_training_data(config, folder)
    return read_training_texts(folder)


def labelled(one: Study, labels: Labels) -> Study:
    return replace(one, views=tuple(replace(view, labels=labels, findings=()) for view in one.views))


MIXED = [
    replace(study(1, "train"), reason="screening"),
    labelled(study(2, "train"), Labels(birads=4)),
    labelled(study(3, "train"), Labels(cancer=True)),
    labelled(study(4, "train"), Labels(density="D")),
]


@pytest.mark.parametrize("style", ["report", "sentence", "caption"])
def test_texts_are_those_of_the_training_studies(tmp_path: Path, style: str) -> None:
    config = config_of(tmp_path, MIXED, style=style, tell_pathology=True)
    found = texts_of(tmp_path, config)
    assert found.wording == wording_of(MIXED, config.data.style, tell_pathology=True)
    assert list(found.statements) == sorted(training_statements(MIXED, config.data))
    assert found.tell_pathology


@pytest.mark.parametrize("studies", [[], MIXED[:1], MIXED[1:3], MIXED])
@pytest.mark.parametrize("tell", [False, True])
def test_wording_study_by_study_is_that_of_all(studies: list[Study], tell: bool) -> None:
    views = [view for one in studies for view in one.views]
    outcomes = {outcome for view in views if (outcome := report_text.outcome(view))} if tell else set()
    assert wording_of(studies, "sentence", tell) == Wording(
        reasons=tuple(sorted({one.reason for one in studies}, key=str)),
        density=any(view.labels.density for view in views),
        birads=any(view.labels.birads is not None for view in views),
        reports=any(report_text.own_words(view) for view in views),
        descriptors=any(view.findings for view in views),
        assessed=any(report_text.assessed(view) for view in views),
        outcomes=tuple(sorted(outcomes)),
        style="sentence",
    )


def test_own_words_of_few_patients_stay_behind(tmp_path: Path) -> None:
    """They may hold whatever a radiologist wrote of one person."""
    often, seldom = "Stippled enhancement and Dr. Jane Roe agrees", "Sister of Mary Poe"
    studies = [study(2 * n + 1, "train", words=often) for n in range(FEWEST_PATIENTS)]
    studies += [study(2 * n + 101, "train", words=seldom) for n in range(FEWEST_PATIENTS - 1)]
    studies += [replace(studies[-1], key=f"again{n}") for n in range(3)]  # of a patient who is counted already
    found = texts_of(tmp_path, config_of(tmp_path, studies))
    assert "Stippled enhancement" in found.statements
    assert "Mary" not in (tmp_path / TEXTS).read_text()
    assert {"BI-RADS 5", "density A"} <= set(found.statements), "what mama writes stays, however seldom"
    assert found.wording.reports


def test_the_studies_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read, real = config_of(tmp_path, MIXED), [], Images.study
    monkeypatch.setattr(Images, "study", lambda images, n: read.append(n) or real(images, n))  # type: ignore[func-returns-value]
    texts_of(tmp_path, config)
    assert read == [0, 1, 2, 3]


def test_an_unreadable_study_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, real = config_of(tmp_path, MIXED), Images.study

    def broken(images: Images, number: int) -> Study:
        if number == 3:
            raise ShardError("its JSON is damaged")
        return real(images, number)

    monkeypatch.setattr(Images, "study", broken)
    assert "density D" not in texts_of(tmp_path, config).statements
    assert f"{MIXED[3].key}: its images and texts are not recorded as trained on" in caplog.text
    known = read_trained_on(tmp_path)
    assert known
    assert len(known.patients) == 4, "patients are those of the manifest"


def test_a_damaged_or_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"texts.json: is missing, as an earlier release wrote the model"):
        read_training_texts(tmp_path)
    texts_of(tmp_path, config_of(tmp_path, MIXED))
    document = json.loads((tmp_path / TEXTS).read_text())
    document["wording"]["style"] = "poem"
    (tmp_path / TEXTS).write_text(json.dumps(document))
    with pytest.raises(
        ConfigError, match=r"is damaged \(wording.style: 'poem' is not one of .*; run `mama consolidate`"
    ):
        read_training_texts(tmp_path)
