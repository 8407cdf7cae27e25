"""The files of a prediction: a folder that is replaced as a whole, in which predictions.json is written last."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from mama.predict.document import Document, Probabilities
from mama.run.files import replaced, surviving
from shards.files import atomic_write, legible

PREDICTIONS = "predictions.json"
MAPS = "maps"
OWN = re.compile(r"predictions(-breast|-exam)?\.(csv|json)|maps|index\.html|exam-\d+\.html")


@contextmanager
def results_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `out`, also of an earlier prediction, at the end of the block.

    Raises `ConfigError` if `out` is something else; `OSError` if it cannot be written.
    """
    require_free(out)
    with replaced(out) as new:
        yield new


def require_free(out: Path) -> None:
    """Raise `ConfigError` unless `out` is missing, empty, or the folder of an earlier prediction alone."""
    earlier = surviving(out)
    if not earlier.exists() and not earlier.is_symlink():
        return
    if not earlier.is_dir():
        raise ConfigError(f"--out: {out} is a file; name a new folder")
    names = sorted(path.name for path in earlier.iterdir())
    others = [name for name in names if not OWN.fullmatch(name)]
    if others or (names and PREDICTIONS not in names):
        named = legible((others or names)[0])
        raise ConfigError(f"--out: {out} holds other files ({named}); name a new folder, or that of a prediction")


def write_results(document: Document, folder: Path) -> None:
    """Write the three tables, then predictions.json."""
    for name, table in (
        ("predictions.csv", _images(document)),
        ("predictions-breast.csv", _breasts(document)),
        ("predictions-exam.csv", _exams(document)),
    ):
        atomic_write(folder / name, _csv(table).encode())
    atomic_write(folder / PREDICTIONS, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _images(document: Document) -> Iterator[list[Any]]:
    yield ["file", "exam", "patient", "laterality", "view", *_columns(document), *document["sentences"]]
    for exam in document["exams"]:
        for image in exam["images"]:
            facts = [image["file"], exam["exam"], exam["patient"], image["laterality"], image["view"]]
            scores = _cells(document, image["scores"], image["calibrated"])
            yield [*facts, *scores, *(image["similarity"][text] for text in document["sentences"])]


def _breasts(document: Document) -> Iterator[list[Any]]:
    yield ["exam", "patient", "laterality", *_columns(document)]
    for exam in document["exams"]:
        for breast in exam["breasts"]:
            scores = _cells(document, breast["scores"], breast["calibrated"])
            yield [exam["exam"], exam["patient"], breast["laterality"], *scores]


def _exams(document: Document) -> Iterator[list[Any]]:
    yield ["exam", "patient", "images", *_columns(document)]
    for exam in document["exams"]:
        scores = _cells(document, exam["scores"], exam["calibrated"])
        yield [exam["exam"], exam["patient"], len(exam["images"]), *scores]


def _columns(document: Document) -> list[str]:
    """<task>/<class> of all tasks, and behind those of a task that is calibrated the same once more."""
    found = []
    for name, task in document["tasks"].items():
        found += [f"{name}/{one}" for one in task["classes"]]
        found += [f"{name}/{one} calibrated" for one in task["classes"] if task["calibration"]]
    return found


def _cells(document: Document, scores: Probabilities, calibrated: Probabilities) -> Iterator[float | None]:
    """The numbers of `_columns`, with all digits; None where there is none."""
    for name, task in document["tasks"].items():
        yield from (scores.get(name, {}).get(one) for one in task["classes"])
        if task["calibration"]:
            yield from (calibrated.get(name, {}).get(one) for one in task["classes"])


def _csv(table: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(table)
    return file.getvalue()
