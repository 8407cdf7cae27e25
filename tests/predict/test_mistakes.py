"""What `mama predict`, `mama embed` and `mama.load` say to a mistake: one line, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import mama
from mama.cli.main import main
from mama.errors import ConfigError
from mama.predict import pictures
from mama.predict.model import Model
from mama.predict.results import require_free, results_folder
from mama.settings.schema import Config
from tests.support.archives import breast, write_dicom, write_png
from tests.support.phantom_run import dicom_files


def told(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> str:
    """The one line of stderr with which the command line ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["mama", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, line
    return str(line)


def notes(model: Model, *files: Path) -> list[str]:
    return [note for exam in model.predict(files)["exams"] for image in exam["images"] for note in image["notes"]]


def test_embeddings_never_replace_a_file(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "thesis.npz").write_text("years of work")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "nowhere")
    for place in ("thesis.npz", "folder.npz", "link.npz"):
        line = told(monkeypatch, capsys, "embed", config.run_folder, dicom_files(config)[0], "--out", tmp_path / place)
        assert line == f"mama: --out: {tmp_path / place} exists; name a new file"
    assert (tmp_path / "thesis.npz").read_text() == "years of work"


def finished(out: Path) -> Path:
    """An earlier prediction of one exam with one map."""
    (out / "maps").mkdir(parents=True)
    maps = {"A mass.": {"file": "maps/00001-1.png"}}
    (out / "predictions.json").write_text(json.dumps({"exams": [{"images": [{"maps": maps}]}]}))
    for name in ("predictions.csv", "index.html", "exam-1.html", "maps/00001-1.png"):
        (out / name).write_text("")
    return out


@pytest.mark.parametrize("name", ["maps/mine.png", "maps/00002-1.png", "maps/a/b.dcm", "exam-2.html", "thesis.docx"])
def test_only_what_a_prediction_wrote_is_replaced(tmp_path: Path, name: str) -> None:
    out = finished(tmp_path / "out")
    require_free(out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds other files \({name}\)"):
        require_free(out)


def test_folders_beside_the_results_are_not_deleted_either(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    with results_folder(tmp_path / "out") as folder:
        (folder / "predictions.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.old", "out.partial"}
    assert len([*tmp_path.rglob("mine.txt")]) == 2


@pytest.mark.parametrize("out", ["", "/", ".", "..", "x/.."])
def test_results_have_a_name(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("predict", "embed"):
        line = told(monkeypatch, capsys, verb, config.run_folder, dicom_files(config)[0], "--out", out)
        assert line.startswith("mama: --out: ")
        assert "name a new one" in line


def test_what_is_no_model_is_told_what_a_model_is(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole, image = config.run_folder / "model", dicom_files(config)[0]
    for name in ("old", "cut"):
        shutil.copytree(whole, tmp_path / name)
        (tmp_path / name / "model.json").unlink()
    (tmp_path / "old" / "model.safetensors").touch()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "table.csv").write_text("image\n")
    checkpoint = next((config.run_folder / "checkpoints").iterdir())
    wrong = {
        tmp_path / "old": "an earlier release wrote this model; run `mama consolidate` again",
        tmp_path / "cut": "has no model.json; copy the whole folder",
        tmp_path / "pictures": "is neither a run nor a model; name a run folder, or a model folder",
        tmp_path / "table.csv": "is a file; name a run folder",
        image: "is a file; name a run folder",
        Path(config.data.shards[0]): "is a folder of shards; name a run folder",
        whole / "vision": f"is a part of a model; name the whole folder, {whole}",
        checkpoint: f"is a checkpoint; run `mama consolidate {checkpoint}`",
    }
    for place, message in wrong.items():
        for line in (
            told(monkeypatch, capsys, "predict", place, image, "--out", tmp_path / "out"),
            told(monkeypatch, capsys, "embed", place, image, "--out", tmp_path / "e.npz"),
            told(monkeypatch, capsys, "eval", place),
        ):
            assert line.startswith(f"mama: {place}: {message}")
        with pytest.raises(ConfigError) as error:
            mama.load(place)
        assert str(error.value).startswith(f"{place}: {message}")
    for verb in ("predict", "embed", "eval"):
        more = [] if verb == "eval" else [image, "--out", tmp_path / "e.npz"]
        assert "'' names no model; name a run folder" in told(monkeypatch, capsys, verb, "", *more)
    with pytest.raises(ConfigError, match="quickstart: no such folder; name a run folder, or a model folder"):
        mama.load("quickstart")


def test_an_empty_text_does_not_mean_the_folder_one_is_in(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    image = dicom_files(config)[0]
    for verb in ("predict", "embed"):
        line = told(monkeypatch, capsys, verb, config.run_folder, "", "--out", tmp_path / "e.npz")
        assert line == "mama: input: '' names nothing; the folder that you are in is '.'"
    arguments = (config.run_folder, image, "--out", tmp_path / "out", "--html")
    assert "--neighbours: '' names nothing" in told(monkeypatch, capsys, "predict", *arguments, "--neighbours", "")
    assert "base: " in told(monkeypatch, capsys, "predict", *arguments, "--base", "")


def test_arguments_of_the_wrong_kind_are_named(config: Config, model: Model) -> None:
    image = dicom_files(config)[0]
    wrong: list[tuple[str, Any]] = [
        *((f"folder: {given!r} is no path", lambda given=given: mama.load(given)) for given in (5, None, b"x")),
        (r"folder: \[5\] is no path", lambda: mama.load([5])),  # type: ignore[arg-type]
        ("folder: '' names nothing", lambda: mama.load("")),
        *(
            (f"device: {given!r} cannot be used", lambda given=given: mama.load(config.run_folder, given))
            for given in ("xx", "cuda:99", "", 2.5)
        ),
        ("base: .* holds its own language model", lambda: mama.load(config.run_folder, base="gpt2")),
        *((f"input: {given!r} is no path", lambda given=given: model.predict(given)) for given in (5, None, b"x")),
        ("input: 5 is no path", lambda: model.embed_images([image, 5])),  # type: ignore[list-item]
        ("input: None is no path", lambda: model.heat_map(None, "A mass.")),  # type: ignore[arg-type]
        ("input: '' names nothing", lambda: model.predict(["", image])),
        ("ask: None is no list of texts", lambda: model.predict(image, ask=None)),  # type: ignore[arg-type]
        ("ask: 5 is no text", lambda: model.predict(image, ask=[5])),  # type: ignore[list-item]
        ("ask: '' is an empty text", lambda: model.predict(image, ask=[""])),
        ("ask: 'mass mass.* more than the 200 tokens", lambda: model.predict(image, ask=["mass " * 300])),
        (r"ask: '<\|padding\|>' is a mark", lambda: model.predict(image, ask=["a mass <|padding|>"])),
        ("tasks: 'cancer' is one text", lambda: model.predict(image, tasks="cancer")),
        ("tasks: melanoma: no such task", lambda: model.predict(image, tasks=["melanoma"])),
        ("texts: 5 is no list of texts", lambda: model.embed_texts(5)),  # type: ignore[arg-type]
        ("split: 'tests' is not one of", lambda: model.predict(config.data.shards[0], split="tests")),
        ("pool: 'median' is not one of mean, max", lambda: model.predict(image, pool="median")),  # type: ignore[arg-type]
        ("workers: -1 is no number", lambda: model.predict(image, workers=-1)),
        ("workers: '2' is no number", lambda: model.predict(image, workers="2")),  # type: ignore[arg-type]
    ]
    for message, call in wrong:
        with pytest.raises(ConfigError, match=f"^{message}") as error:
            call()
        assert "\n" not in str(error.value)
        assert "--" not in str(error.value).replace("(--base)", "")


def test_without_a_study_the_images_of_a_patient_are_one_exam(model: Model, tmp_path: Path) -> None:
    for number, (patient, side) in enumerate([("P1", "L"), ("P1", "R"), ("P2", "L")]):
        facts = {"PatientID": patient, "StudyInstanceUID": None, "ImageLaterality": side}
        write_dicom(tmp_path / f"{number}.dcm", breast(side, seed=number), **facts)
    document = model.predict(tmp_path)
    assert [(exam["patient"], exam["exam"], len(exam["images"])) for exam in document["exams"]] == [
        ("P1", "P1", 2),
        ("P2", "P2", 1),
    ]
    for exam in document["exams"]:
        assert all("images of the patient are one exam" in " ".join(image["notes"]) for image in exam["images"])
    table = tmp_path / "exams.csv"
    table.write_text("image,patient\n0.dcm,Q\n1.dcm,Q\n")
    (exam,) = model.predict(table)["exams"]
    assert (exam["patient"], exam["exam"], len(exam["images"])) == ("Q", "Q", 2)


def test_what_is_guessed_or_left_unread_is_noted(model: Model, tmp_path: Path) -> None:
    stated, turned = tmp_path / "stated.dcm", tmp_path / "turned.dcm"
    write_dicom(stated, breast("L"), PatientOrientation=["A", "R"])
    write_dicom(turned, breast("L"), PatientOrientation=["A", "R"], ImageLaterality=None)
    pixels = (breast("L") >> 4).astype(np.uint8)
    assert cv2.imwritemulti(str(tmp_path / "pages.tif"), [pixels, pixels, pixels])
    cv2.imwrite(str(tmp_path / "one.tif"), pixels)
    assert not any("PatientOrientation" in note for note in notes(model, stated))
    assert any("PatientOrientation alone" in note for note in notes(model, turned))
    assert any("the first of the 3 pages" in note for note in notes(model, tmp_path / "pages.tif"))
    assert not any("pages" in note for note in notes(model, tmp_path / "one.tif"))


def test_reasons_name_no_setting_that_there_is_not(model: Model, tmp_path: Path) -> None:
    write_dicom(tmp_path / "volume.dcm", np.stack([breast("L")] * 2))
    (refused,) = model.predict(tmp_path)["refused"]
    assert refused["message"] == "2 frames: tomosynthesis, which this model was not trained on"
    (tmp_path / "t.csv").write_text("image,laterality,view\nvolume.dcm,L,RCC\n")
    (refused,) = model.predict(tmp_path / "t.csv")["refused"]
    assert refused["message"] == "columns laterality and view name different sides in row 2"
    (tmp_path / "t.csv").write_text("image,age\nvolume.dcm,50\n")
    with pytest.raises(ConfigError, match=r"column 'age' is none of .*; rename or remove it$"):
        model.predict(tmp_path / "t.csv")


def test_a_name_of_two_lines_is_logged_in_one(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_png(folder / "good.png", (breast("L") >> 4).astype(np.uint8))
    (folder / "a\nb\x1b[31m.png").write_text("no picture")
    (folder / "c\nd.txt").write_text("no picture")
    done = mama_process("predict", config.run_folder, folder, "--out", tmp_path / "out", "--workers", 0)
    told = done.communicate()[1]
    assert done.returncode == 3
    lines = told.splitlines()
    assert "\x1b" not in told
    assert any(line.startswith("refused: ") and "a\\nb\\x1b[31m.png: unreadable" in line for line in lines)
    assert any("c\\nd.txt" in line for line in lines)


def mama_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mama", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_one_line_and_leaves_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    files = dicom_files(config)[:2]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pictures, "stored_image", lambda *_, **__: signal.raise_signal(number))
    for verb, out in (("predict", "out"), ("embed", "e.npz")):
        arguments = ["mama", verb, str(config.run_folder), *map(str, files), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*arguments, "--workers", "0"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 75
        assert capsys.readouterr().err.splitlines() == ["mama: a signal ended it; nothing was written"]
        assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before
