"""The files of a prediction: a folder that is replaced as a whole, in which predictions.json is written last."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.predict.document import BreastScores, Document, ExamScores, ImageScores
from mama.run.files import read_object, replaced
from shards.files import atomic_write, legible

PREDICTIONS = "predictions.json"
MAPS = "maps"
TABLES = ("predictions.csv", "predictions-breast.csv", "predictions-exam.csv")
Scored = ImageScores | BreastScores | ExamScores


@contextmanager
def results_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out`, also of an earlier prediction, at the end of the block.

    Raises `ConfigError` if `out` is something else; `OSError` if it cannot be written.
    """
    require_free(out)
    with replaced(out.resolve() if out.is_symlink() else out) as new:
        yield new


def require_free(out: Path) -> None:
    """Raise `ConfigError` unless `out` is missing, empty, or the folder of an earlier prediction alone."""
    if out.name in ("", ".."):
        raise ConfigError(f"--out: {str(out)!r} is no name of a folder; name a new one, for example predictions")
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a new folder")
    if other := _foreign(out):
        raise ConfigError(
            f"--out: {out} holds other files ({legible(other)}); name a new folder, or that of a prediction"
        )


def _foreign(folder: Path) -> str | None:
    """A file that no prediction wrote into a folder: one that its predictions.json does not name."""
    found = (
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
    )
    own = _named(folder / PREDICTIONS)
    return next((file for file in sorted(found) if file not in own), None)


def _named(file: Path) -> set[str]:
    """The files that a predictions.json names, and itself; none if it is no such file."""
    try:
        document = read_object(file)
        exams = document["exams"]
        maps = _maps(exams)
    except (ConfigError, KeyError, TypeError, AttributeError):
        return set()
    pages = {"index.html", *(f"exam-{number}.html" for number in range(1, len(exams) + 1))}
    return {PREDICTIONS, *TABLES, *pages, *maps}


def _maps(exams: Sequence[Any]) -> set[str]:
    """The files of the maps of all images."""
    return {one["file"] for exam in exams for image in exam["images"] for one in image.get("maps", {}).values()}


def write_results(document: Document, folder: Path) -> None:
    """Write the three tables, then predictions.json; maps of images that were refused after all are removed."""
    maps = _maps(document["exams"])
    for path in (folder / MAPS).glob("*"):
        if f"{MAPS}/{path.name}" not in maps:
            path.unlink()
    for name, table in zip(TABLES, (_images(document), _breasts(document), _exams(document)), strict=True):
        atomic_write(folder / name, _csv(table).encode())
    atomic_write(folder / PREDICTIONS, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _images(document: Document) -> Iterator[list[Any]]:
    sentences = document["sentences"]
    adjusted = _calibrated(image for exam in document["exams"] for image in exam["images"])
    yield ["file", "exam", "patient", "laterality", "view", *_columns(document, adjusted), *sentences]
    for exam in document["exams"]:
        for image in exam["images"]:
            facts = [image["file"], exam["exam"], exam["patient"], image["laterality"], image["view"]]
            yield [*facts, *_cells(document, image, adjusted), *(image["similarity"][text] for text in sentences)]


def _breasts(document: Document) -> Iterator[list[Any]]:
    adjusted = _calibrated(breast for exam in document["exams"] for breast in exam["breasts"])
    yield ["exam", "patient", "laterality", *_columns(document, adjusted)]
    for exam in document["exams"]:
        for breast in exam["breasts"]:
            yield [exam["exam"], exam["patient"], breast["laterality"], *_cells(document, breast, adjusted)]


def _exams(document: Document) -> Iterator[list[Any]]:
    adjusted = _calibrated(document["exams"])
    yield ["exam", "patient", "images", *_columns(document, adjusted)]
    for exam in document["exams"]:
        yield [exam["exam"], exam["patient"], len(exam["images"]), *_cells(document, exam, adjusted)]


def _calibrated(units: Iterable[Scored]) -> set[str]:
    """The tasks that are calibrated for units of this kind."""
    return {task for unit in units for task in unit["calibrated"]}


def _columns(document: Document, calibrated: set[str]) -> list[str]:
    """<task>/<class> of all tasks, and behind those of a task that is `calibrated` the same once more."""
    found = []
    for name, task in document["tasks"].items():
        found += [f"{name}/{one}" for one in task["classes"]]
        found += [f"{name}/{one} calibrated" for one in task["classes"] if name in calibrated]
    return found


def _cells(document: Document, unit: Scored, calibrated: set[str]) -> Iterator[float | None]:
    """The numbers of `_columns`, with all digits; None where there is none."""
    for name, task in document["tasks"].items():
        yield from (unit["scores"].get(name, {}).get(one) for one in task["classes"])
        if name in calibrated:
            yield from (unit["calibrated"].get(name, {}).get(one) for one in task["classes"])


def _csv(table: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(table)
    return file.getvalue()
