"""Scores of image files: those of the evaluation, by exam; what is refused, and what is a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from pydicom.uid import DigitalMammographyXRayImageStorageForProcessing, generate_uid

from mama.cli.main import main
from mama.errors import ConfigError
from mama.evaluate.zero_shot import probabilities
from mama.export.figures import CALIBRATION
from mama.model.vision_tower import VisionTower
from mama.predict.document import Document
from mama.predict.exam_page import write_pages
from mama.predict.exams import with_implants_of_breasts
from mama.predict.images import find_images
from mama.predict.model import Model
from mama.predict.pictures import ImageFile, pictures
from mama.predict.results import write_results
from mama.run.files import write_with_digest
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.pack.identity import keyed_hash, load_key
from shards.pack.sample import Refusal
from shards.read.reader import ShardReader
from tests.support.archives import breast, write_dicom, write_png
from tests.support.checkout import CHECKOUT
from tests.support.phantom_run import TASKS, dicom_files

UNITS = {"image": "predictions.csv", "breast": "predictions-breast.csv", "exam": "predictions-exam.csv"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["mama", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def images(document: Document) -> dict[str, dict[str, Any]]:
    return {Path(image["file"]).name: dict(image) for exam in document["exams"] for image in exam["images"]}


def reasons(document: Document) -> dict[str, str]:
    return {Path(one["file"]).name: one["reason"] for one in document["refused"]}


def test_scores_of_files_are_those_of_the_evaluation(
    config: Config, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files -> predictions.csv here, shards -> predictions.csv there, joined by patient, side and view."""
    out = tmp_path / "out"
    assert run(monkeypatch, "predict", config.run_folder, archive, "--out", out, "--workers", 2) == 0
    key = load_key(Path(config.runs).parent / "hash.key")
    reader = ShardReader(config.data.shards[0], "test")
    views = {
        f"{s.key}/{v.member}": (v.laterality, v.view) for s in map(reader.study, range(len(reader))) for v in s.views
    }
    for unit, file in UNITS.items():
        ours = pd.read_csv(out / file)
        ours["patient"] = [keyed_hash(key, "patient", "phantom", patient) for patient in ours.patient]
        by = ["patient", *{"image": ["laterality", "view"], "breast": ["laterality"], "exam": []}[unit]]
        for task in TASKS:
            theirs = pd.read_csv(config.run_folder / "eval" / task / file)
            theirs = theirs[(theirs.protocol == "zero-shot") & (theirs.model == "trained")]
            classes = list(theirs.columns[5:])
            if unit == "image":
                theirs["laterality"], theirs["view"] = zip(*(views[key] for key in theirs.image), strict=True)
            elif unit == "breast":
                theirs["laterality"] = theirs.breast.str[-1]
            joined = theirs.merge(ours, on=by)
            assert len(joined) == len(theirs) > 0
            found = joined[[f"{task}/{name}" for name in classes]].to_numpy()
            assert np.abs(found - joined[classes].to_numpy()).max() < 1e-5, (unit, task)


def test_shards_and_files_give_the_same_scores(config: Config, model: Model, archive: Path) -> None:
    of_files = model.predict(archive)
    of_shards = model.predict(config.data.shards[0])
    assert len(of_shards["exams"]) == len(of_files["exams"]) == 4
    both = [
        sorted((exam["scores"]["cancer"]["cancer"], len(exam["images"])) for exam in document["exams"])
        for document in (of_files, of_shards)
    ]
    assert np.allclose(both[0], both[1], atol=1e-6)
    test = model.predict(config.data.shards, split="test")
    assert len(test["exams"]) == 1


def test_calibrated_scores_are_those_that_the_evaluation_fitted(
    config: Config, model: Model, archive: Path, tmp_path: Path
) -> None:
    document = model.predict(archive)
    fitted = json.loads((config.run_folder / "model" / CALIBRATION).read_text())["tasks"]["cancer"]["units"]
    assert document["tasks"]["cancer"]["calibration"] == "temperature"
    assert [unit for unit in UNITS if fitted[unit]["temperature"]] == ["image", "breast"], "val has one exam"
    for exam in document["exams"]:
        assert "cancer" not in exam["calibrated"]
        for unit, ones in (("image", exam["images"]), ("breast", exam["breasts"])):
            for one in ones:
                odds = one["scores"]["cancer"]["cancer"] / one["scores"]["cancer"]["no cancer"]
                cooled = odds ** (1 / fitted[unit]["temperature"])
                calibrated = one["calibrated"]["cancer"]["cancer"]
                assert calibrated == pytest.approx(cooled / (1 + cooled), abs=1e-9)
    highest = model.predict(archive, pool="max")
    assert "cancer" in highest["exams"][0]["images"][0]["calibrated"]
    assert highest["exams"][0]["breasts"][0]["calibrated"] == {}, "the evaluation pooled by the mean"
    reasons = document["tasks"]["cancer"]["reason"], highest["tasks"]["cancer"]["reason"]
    assert reasons == (
        "exams: `val` has one class only",
        "breasts and exams: it was fitted to scores pooled by mean, not max",
    )
    write_results(highest, tmp_path)
    columns = {unit: list(pd.read_csv(tmp_path / file).columns) for unit, file in UNITS.items()}
    assert ["cancer/cancer calibrated" in columns[unit] for unit in UNITS] == [True, False, False]
    write_pages(highest, {}, tmp_path)
    assert f"Calibration: temperature, but none for {reasons[1]}." in (tmp_path / "exam-1.html").read_text()


def test_without_an_evaluation_of_these_weights_scores_are_not_calibrated(
    config: Config, archive: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(config.run_folder / "model", folder)
    document = json.loads((folder / CALIBRATION).read_text())
    del document["digest"]
    write_with_digest(folder / CALIBRATION, {**document, "model": "0" * 64, "checkpoint": "0" * 64})
    one = next(archive.rglob("*.dcm"))
    found = Model(folder, device="cpu").predict(one)
    assert found["tasks"]["cancer"]["calibration"] is None
    assert "another checkpoint" in str(found["tasks"]["cancer"]["reason"])
    tasks = document["tasks"]
    tasks["cancer"]["prompts"] = "0" * 64
    write_with_digest(folder / CALIBRATION, {**document, "tasks": tasks})
    found = Model(folder, device="cpu").predict(one)
    assert "other class prompts: `mama eval` words them after the reports of" in str(found["tasks"]["cancer"]["reason"])
    assert found["tasks"]["density"]["calibration"] or found["tasks"]["density"]["reason"]
    (folder / CALIBRATION).unlink()
    assert "mama eval" in str(Model(folder, device="cpu").predict(one)["tasks"]["cancer"]["reason"])


def test_breasts_and_exams_are_pooled_from_their_images(model: Model, archive: Path) -> None:
    for pool, combine in (("mean", np.mean), ("max", np.max)):
        (exam, *_) = model.predict(archive, pool=pool)["exams"]  # type: ignore[arg-type]
        scores = {(i["laterality"], i["view"]): i["scores"]["cancer"]["cancer"] for i in exam["images"]}
        assert exam["scores"]["cancer"]["cancer"] == pytest.approx(combine(list(scores.values())))
        for side in exam["breasts"]:
            own = [score for (laterality, _), score in scores.items() if laterality == side["laterality"]]
            assert side["scores"]["cancer"]["cancer"] == pytest.approx(combine(own))


def test_classes_that_the_training_texts_never_taught_are_named(model: Model, archive: Path) -> None:
    document = model.predict(next(archive.rglob("*.dcm")), tasks=["birads", "density", "asymmetry"])
    assert "BI-RADS 6" in document["not_taught"]["birads"]
    assert "BI-RADS 6" in (document["tasks"]["birads"]["left_out"] or [])
    assert "asymmetry" in document["not_taught"]["asymmetry"]
    assert document["tasks"]["asymmetry"]["left_out"] is None, "a question of two classes keeps both"
    assert "asymmetry" not in model.predict(next(archive.rglob("*.dcm")))["tasks"]


def test_a_sentence_of_your_own_is_its_cosine(model: Model, archive: Path) -> None:
    files = sorted(archive.rglob("*.dcm"))[:3]
    asked = "A spiculated mass."
    document = model.predict(files, ask=[asked, asked], tasks=[])
    assert document["tasks"] == {}
    vectors, texts = model.embed_images(files), model.embed_texts([asked])
    assert vectors.dtype == texts.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    found = [image["similarity"][asked] for image in images(document).values()]
    assert np.allclose(found, vectors @ texts[0], atol=1e-6)


def test_a_task_of_your_own_has_its_words(model: Model, archive: Path, tmp_path: Path) -> None:
    file = tmp_path / "side.yaml"
    file.write_text(
        "title: Side\nlabel: cancer\nclasses: {a: [false], b: [true]}\nimages: {laterality: [L]}\n"
        "words: {a: [a mass], b: [a scar]}\n"
    )
    document = model.predict(archive, tasks=[str(file)])
    exam = document["exams"][0]
    assert ["side" in image["scores"] for image in exam["images"]] == [True, True, False, False]
    assert [breast["laterality"] for breast in exam["breasts"] if "side" in breast["scores"]] == ["L"]
    left = model.embed_images([image["file"] for image in exam["images"][:2]])
    texts = model.embed_texts(["a mass", "a scar"])
    wanted = probabilities(left, texts, model.model.scale().item())
    assert np.allclose([image["scores"]["side"]["b"] for image in exam["images"][:2]], wanted[:, 1], atol=1e-6)
    file.write_text(file.read_text().replace("laterality: [L]", "age: [40, 50]"))
    with pytest.raises(ConfigError, match="by their age, which a file does not state"):
        model.predict(archive, tasks=[str(file)])


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A folder of an exam in which nearly everything is wrong."""
    folder = tmp_path / "odd"
    facts = {"PatientID": "P1", "StudyInstanceUID": "1.2.3"}
    uid = generate_uid()
    raw = {"SOPClassUID": DigitalMammographyXRayImageStorageForProcessing, "PresentationIntentType": "FOR PROCESSING"}
    write_dicom(folder / "a-left.dcm", breast("L"), **facts, SOPInstanceUID=uid)
    write_dicom(folder / "b-copy.dcm", breast("L"), **facts, SOPInstanceUID=uid)
    write_dicom(folder / "c-again.dcm", breast("L", seed=1), **facts)
    write_dicom(folder / "d-raw.dcm", 4095 - breast("R"), **facts, ImageLaterality="R", **raw)
    write_dicom(folder / "e-spot.dcm", breast("L"), **facts, ViewPosition="ML")
    write_dicom(folder / "f-volume.dcm", np.stack([breast("L")] * 2), **facts)
    write_dicom(folder / "g-no-side.dcm", breast("R", seed=2), **facts, ImageLaterality=None, ViewPosition=None)
    write_dicom(folder / "h-other.dcm", breast("L", seed=3), **(facts | {"PatientID": "P2"}))
    (folder / "i-cut.dcm").write_bytes((folder / "a-left.dcm").read_bytes()[:5000])
    write_png(folder / "j-plain.png", (breast("L", seed=4) >> 4).astype(np.uint8))
    (folder / "k-blank.png").write_bytes(b"not a picture")
    (folder / "read me.txt").write_text("no image")
    return folder


def test_everything_refused_is_named_and_the_rest_is_scored(
    config: Config, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    with caplog.at_level("WARNING"):
        assert run(monkeypatch, "predict", config.run_folder, odd, "--out", out, "--workers", 0) == 3
    document = json.loads((out / "predictions.json").read_text())
    assert reasons(document) == {
        "b-copy.dcm": "duplicate",
        "d-raw.dcm": "for-processing",
        "e-spot.dcm": "other-view",
        "f-volume.dcm": "tomosynthesis",
        "i-cut.dcm": "unreadable",
        "k-blank.png": "unreadable",
    }
    told = caplog.text
    assert all(name in told for name in (*reasons(document), "read me.txt"))
    assert "--for-processing" in told
    exams = {(exam["patient"], exam["exam"]): exam for exam in document["exams"]}
    assert sorted(map(str, exams)) == sorted(
        map(str, [("P1", "1.2.3"), ("P2", "1.2.3"), (None, str(odd / "j-plain.png"))])
    )
    first = exams["P1", "1.2.3"]
    assert [Path(image["file"]).name for image in first["images"]] == ["a-left.dcm", "c-again.dcm", "g-no-side.dcm"]
    assert [breast["laterality"] for breast in first["breasts"]] == ["L"]
    scores = [image["scores"]["cancer"]["cancer"] for image in first["images"]]
    assert first["breasts"][0]["scores"]["cancer"]["cancer"] == pytest.approx(np.mean(scores[:2]))
    assert first["scores"]["cancer"]["cancer"] == pytest.approx(np.mean(scores))
    notes = {name: " ".join(image["notes"]) for name, image in images(document).items()}
    assert "2 images of L-CC" in notes["a-left.dcm"]
    assert "side is not known" in notes["g-no-side.dcm"]
    assert "view is not known" in notes["g-no-side.dcm"]
    assert "another patient" in notes["h-other.dcm"]
    assert "an exam by itself" in notes["j-plain.png"]
    assert "Not for clinical use" in document["notice"]


def test_raw_images_are_rendered_if_asked_for(model: Model, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (exam, *_) = model.predict(odd, for_processing=True)["exams"]
    raw = {Path(image["file"]).name: image for image in exam["images"]}["d-raw.dcm"]
    assert any("FOR PROCESSING" in note and "rendered" in note for note in raw["notes"])
    dataset = pydicom.dcmread(odd / "d-raw.dcm")
    dataset.ImageLaterality, dataset.SOPInstanceUID = "L", generate_uid()
    dataset.save_as(odd / "z-raw-left.dcm")
    document = model.predict(odd, for_processing=True)
    assert reasons(document)["z-raw-left.dcm"] == "other-intent", "its view has an image for presentation"
    monkeypatch.setattr(model, "preprocessing", replace(model.preprocessing, intent="processing"))
    found = reasons(model.predict(odd, for_processing=True))
    assert found["a-left.dcm"] == found["c-again.dcm"] == "other-intent", "as packing the training shards did"
    assert "z-raw-left.dcm" not in found
    monkeypatch.setattr(model, "preprocessing", replace(model.preprocessing, intent="both"))
    assert "other-intent" not in reasons(model.predict(odd, for_processing=True)).values()


def test_an_implant_is_one_of_the_whole_breast(model: Model, config: Config) -> None:
    files = dicom_files(config)[:4]
    images = list(model.encoder.embedded(find_images(files, None, config.data.cache_folder), model.recipe(), 0, []))
    (shown, *_) = images
    image = replace(shown.image, facts=replace(shown.image.facts, implant=True))
    found = with_implants_of_breasts([replace(shown, image=image), *images[1:]])
    for before, after in zip(images, found, strict=True):
        own = (before.exam, before.image.laterality) == (shown.exam, shown.image.laterality)
        assert after.image.facts.implant == (True if own else before.image.facts.implant)
        assert after.image.facts.implant == after.image.study.views[0].implant


def test_a_table_says_what_headers_do_not(model: Model, odd: Path) -> None:
    table = odd / "exams.csv"
    table.write_text(
        "image;study;patient;laterality;view\n"
        "j-plain.png;S1;7.0;right;MLO\n"
        "a-left.dcm;S1;7;;\n"
        "g-no-side.dcm;;;R;LCC\n"
        "gone.dcm;S1;7;L;CC\n"
        "c-again.dcm;S1;7;both;CC\n"
        ";S1;7;L;CC\n"
        "h-other.dcm;;;;XCCL\n"
    )
    document = model.predict(table)
    assert [one["reason"] for one in document["refused"]] == [
        *("label-conflict", "missing", "label", "identifier", "other-view"),
    ]
    (exam,) = document["exams"]
    assert (exam["patient"], exam["exam"]) == ("7", "S1")
    sides = {Path(image["file"]).name: (image["laterality"], image["view"]) for image in exam["images"]}
    assert sides == {"j-plain.png": ("R", "MLO"), "a-left.dcm": ("L", "CC")}
    table.write_text("image,laterality\na-left.dcm,R\n")
    (exam,) = model.predict(table)["exams"]
    assert exam["images"][0]["laterality"] == "R"
    assert any("the table wins" in note for note in exam["images"][0]["notes"])
    assert (exam["patient"], exam["exam"]) == ("P1", "1.2.3")


def test_folders_behind_links_are_read_once(model: Model, odd: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "there").symlink_to(odd.rename(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "linked")
    os.mkfifo(tmp_path / "linked" / "pipe")
    document = model.predict(tmp_path / "linked")
    assert len(images(document)) + len(document["refused"]) == 11


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,lateralty", "column 'lateralty' is none of .*did you mean laterality"),
        ("image,cancer", "column 'cancer' is none of"),
        ("file,view", "column 'file' is none of"),
        ("view,patient", "has no column 'image'"),
        ("image,image", "has 2 columns 'image'"),
    ],
)
def test_a_column_that_is_not_used_is_an_error(model: Model, odd: Path, header: str, message: str) -> None:
    (odd / "exams.csv").write_text(f"{header}\na-left.dcm,L\n")
    with pytest.raises((ConfigError, ShardError), match=message):
        model.predict(odd / "exams.csv")


class Bomb:
    """A path that ends the worker process which receives it, as a decoder that crashes does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_decoder_that_crashes_costs_its_own_image_only(model: Model, config: Config) -> None:
    files = [ImageFile(path.name, path) for path in dicom_files(config)[:3]]
    bomb = ImageFile("bomb.dcm", Bomb())  # type: ignore[arg-type]
    found = list(pictures(model.recipe(), [files[0], bomb, *files[1:]], 2))
    assert [one.file for one in found] == [files[0].file, "bomb.dcm", *(file.file for file in files[1:])]
    assert [one.reason for one in found if isinstance(one, Refusal)] == ["crash"]


def test_a_file_that_is_given_twice_counts_once(model: Model, archive: Path) -> None:
    one = next(archive.rglob("*.dcm"))
    document = model.predict([one, one.parent])
    assert [line["reason"] for line in document["refused"]] == ["duplicate"]
    assert len(images(document)) == 4


def test_mistakes_end_in_one_line(
    config: Config, archive: Path, odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one, other = next(archive.rglob("*.dcm")), tmp_path / "other"
    (tmp_path / "empty").mkdir()
    other.mkdir()
    (other / "thesis.docx").write_text("")
    (tmp_path / "t.xlsx").write_text("")
    out = ("--out", tmp_path / "out")
    wrong: list[tuple[str, tuple[object, ...]]] = [
        ("holds no image", (tmp_path / "empty", *out)),
        ("no such file or folder", (tmp_path / "nothing.dcm", *out)),
        ("save it as a .csv", (tmp_path / "t.xlsx", *out)),
        ("an empty text", (one, *out, "--ask", " ")),
        ("more than the 200 tokens", (one, *out, "--ask", "mass " * 300)),
        ("--task: melanoma: no such task", (one, *out, "--task", "melanoma")),
        ("split: test, but none of the inputs", (one, *out, "--split", "test")),
        ("split: 'tests' is not one of", (config.data.shards[0], *out, "--split", "tests")),
        ("holds other files (thesis.docx)", (one, "--out", other)),
        ("is a file", (one, "--out", one)),
        ("none of the 1 images can be scored", (odd / "i-cut.dcm", *out)),
    ]
    for message, arguments in wrong:
        assert run(monkeypatch, "predict", config.run_folder, *arguments, "--workers", 0) == 2
        told = capsys.readouterr().err
        assert message in told.splitlines()[-1], told
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_model_folder_without_its_texts_says_what_to_do(config: Config, archive: Path, tmp_path: Path) -> None:
    for name in ("texts.json", "preprocessing.json", "model.json"):
        folder = tmp_path / name / "model"
        shutil.copytree(config.run_folder / "model", folder)
        (folder / name).unlink()
        with pytest.raises(ConfigError, match=f"{name}.*mama consolidate"):
            Model(folder, device="cpu")


def test_an_earlier_prediction_is_replaced_as_a_whole(
    config: Config, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = sorted(archive.rglob("*.dcm")), tmp_path / "out"
    model = config.run_folder / "model"
    assert run(monkeypatch, "predict", model, files[0], "--out", out, "--ask", "A mass.", "--workers", 0) == 0
    facts = next(iter(images(json.loads((out / "predictions.json").read_text())).values()))["maps"]["A mass."]
    assert (out / facts["file"]).exists()
    assert run(monkeypatch, "predict", model, *files[:2], "--out", out, "--workers", 0) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*UNITS.values(), "predictions.json"])
    assert len(images(json.loads((out / "predictions.json").read_text()))) == 2
    shutil.copy(files[2], tmp_path / "beside.dcm")
    (out / "maps").mkdir()
    shutil.copy(files[3], out / "maps" / "a.dcm")
    assert list(images(Model(model, device="cpu").predict(tmp_path))) == ["beside.dcm"], "of the results nothing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(
    config: Config, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tmp_path.chmod(0o500)
    assert run(monkeypatch, "predict", config.run_folder, archive, "--out", tmp_path / "out") == 2
    assert "Permission denied" in capsys.readouterr().err


def test_importing_mama_is_light() -> None:
    program = (
        "import sys; import mama; "
        "print(callable(mama.load), *{'torch', 'numpy', 'pandas', 'cv2', 'click'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_python_says_what_is_wrong(model: Model, archive: Path, odd: Path) -> None:
    with pytest.raises(ConfigError, match="is one text; give a list"):
        model.predict(archive, ask="a mass")
    with pytest.raises(ConfigError, match=r"i-cut\.dcm: unreadable"):
        model.embed_images([odd / "a-left.dcm", odd / "i-cut.dcm"])
    with pytest.raises(ConfigError, match="empty"):
        model.embed_texts(["a mass", ""])
    with pytest.raises(ConfigError, match="name one file"):
        model.heat_map(archive, "a mass")


def test_the_lines_of_python_in_the_documents_run(
    config: Config, archive: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(config.run_folder)
    (tmp_path / "runs" / "phantom-dicom").mkdir()
    for name in ("exam", "runs/phantom-dicom/PHANTOM-0-00000"):
        (tmp_path / name).symlink_to(next(archive.glob("PHANTOM*")))
    monkeypatch.chdir(tmp_path)
    pages = [CHECKOUT / "README.md", CHECKOUT / "docs" / "predict.md"]
    programs = [one for page in pages for one in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert programs
    for program in programs:
        found: dict[str, Any] = {}
        exec(program, found)
        assert "mama" in found


def test_a_heat_map_has_the_size_of_the_file(config: Config, model: Model) -> None:
    found = model.heat_map(dicom_files(config)[0], "A mass.")
    assert found.shape == (640, 512)
    assert np.isfinite(found).any()
    assert np.nanmax(np.abs(found)) <= 1


def test_the_image_tower_sees_a_picture_once_for_scores_and_maps(
    config: Config, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out, asked = dicom_files(config)[:3], tmp_path / "out", ("A mass.", "Clustered calcifications.")
    passed, forward = [], VisionTower.forward

    def counted(self: VisionTower, pixels: torch.Tensor, *more: Any) -> Any:
        passed.append(len(pixels))
        return forward(self, pixels, *more)

    sentences = [word for text in asked for word in ("--ask", text)]
    with monkeypatch.context() as patched:
        patched.setattr(VisionTower, "forward", counted)
        assert run(patched, "predict", config.run_folder, *files, "--out", out, *sentences, "--workers", 0) == 0
    assert sum(passed) == len(files)
    found = images(json.loads((out / "predictions.json").read_text()))
    for file in files:
        for text, facts in found[file.name]["maps"].items():
            grey = cv2.imread(str(out / facts["file"]), cv2.IMREAD_GRAYSCALE)
            assert grey is not None
            values = facts["low"] + (np.where(grey, grey, np.nan) - 1) / 254 * (facts["high"] - facts["low"])
            step = (facts["high"] - facts["low"]) / 254
            np.testing.assert_allclose(values, model.heat_map(file, text), atol=0.51 * step + 1e-6)


def test_pages_and_neighbours_are_written_beside_the_scores(
    config: Config, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files, out = dicom_files(config)[:2], tmp_path / "out"
    more = ("--ask", "A mass.", "--html", "--neighbours", config.data.shards[0], "--workers", 0)
    assert run(monkeypatch, "predict", config.run_folder, *files, "--out", out, *more) == 0
    assert {"index.html", "exam-1.html"} <= {path.name for path in out.iterdir()}
    page = (out / "exam-1.html").read_text()
    assert page.count("data:image/jpeg") > 2, "pictures of the exam and of its neighbours"
    for image in images(json.loads((out / "predictions.json").read_text())).values():
        drawn = cv2.imread(str(out / image["maps"]["A mass."]["file"]), cv2.IMREAD_GRAYSCALE)
        assert drawn is not None
        assert drawn.shape == (640, 512)
    arguments = (config.run_folder, *files, "--neighbours", config.data.shards[0], "--out", tmp_path / "none")
    assert run(monkeypatch, "predict", *arguments) == 2
    assert "add --html" in capsys.readouterr().err
