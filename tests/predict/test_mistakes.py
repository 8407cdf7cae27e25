"""What `mama predict`, `mama embed` and `mama.load` say to a mistake: one line, and nothing is lost."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mama.cli.main import main
from mama.errors import ConfigError
from mama.predict.model import Model
from mama.predict.results import require_free, results_folder
from mama.settings.schema import Config
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
    for place in (tmp_path / "thesis.npz", tmp_path):
        place = place if place.suffix else tmp_path / "folder.npz"
        place.exists() or place.mkdir()
        line = told(monkeypatch, capsys, "embed", config.run_folder, dicom_files(config)[0], "--out", place)
        assert "exists; name a new file" in line
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
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        require_free(tmp_path / "out")
        (tmp_path / name / "mine.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"holds other files \(mine.txt\)"), results_folder(tmp_path / "out"):
            pass
        (tmp_path / name / "mine.txt").unlink()
    finished(tmp_path / "out.partial")
    shutil.copytree(finished(tmp_path / "out"), tmp_path / "out.old", dirs_exist_ok=True)
    with results_folder(tmp_path / "out") as folder:
        (folder / "predictions.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "predictions.json"]


@pytest.mark.parametrize("out", ["", "/", ".", "..", "x/.."])
def test_results_have_a_name(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("predict", "embed"):
        line = told(monkeypatch, capsys, verb, config.run_folder, dicom_files(config)[0], "--out", out)
        assert line.startswith("mama: --out: ")
        assert "name a new one" in line
