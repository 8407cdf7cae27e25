"""What the evaluations of a sweep's points left in their folders: the figures, and of which images they are.

Figures stand in one column only if they are of the same images (digest of the shards, split), task, protocol and model.
A point is evaluated with the settings that it was trained with; figures that were measured with others, such as an
image size, have a column of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mama.evaluate.fractions import label_of
from mama.evaluate.provenance import Document, model_of, object_in, same, settings_of
from mama.evaluate.result_folders import MARKER, METRICS, evaluations
from mama.evaluate.results import shown_rows
from mama.settings.schema import TASKS
from mama.sweep import status
from mama.sweep.sweep import Point, Sweep

# Settings of an evaluation that change its intervals or its further rows, and the seed, which differs within a method.
NO_MATTER = (
    *("seed", "resamples", "prevalence", "interval"),
    *("intensity_baseline", "protocols", "fractions", "draws", "boxes"),
)
POINTING = "pointing game"  # the protocol of the figures of the local alignment
POINTED = {"hit_rate": "hit rate", "strict_hit_rate": "strict hit rate", "box_auc": "box AUC"}  # and their titles


@dataclass(frozen=True)
class ImageSet:
    """The images that figures are of, and the settings in which the evaluation departs from the point's own."""

    digest: str
    split: str
    departs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Column:
    """Figures of one column can be compared."""

    images: ImageSet
    task: str
    protocol: str
    model: str  # "trained", or what it is compared with
    unit: str = "image"  # or that of the task
    definition: str = ""  # of a task that is not a shipped one, as JSON: two files of one name are two tasks

    @property
    def title(self) -> str:
        """The protocol, and the unit if that is not the image."""
        return self.protocol if self.unit == "image" else f"{self.protocol}, by {self.unit}"


@dataclass(frozen=True)
class Measured:
    """The figures of one point in one column."""

    point: Point
    column: Column
    folder: Path  # of the task, with its predictions.csv
    set_name: str  # the names of the folders of shards
    task: Document  # its metrics.json
    estimates: dict[str, Document]  # metric -> value, low, high, resamples, reason
    step: int | None  # of the weights
    when: datetime


def measurements(point: Point) -> tuple[list[Measured], list[str]]:
    """All figures of a point, and what could not be read, a sentence each."""
    found: list[Measured] = []
    unread: list[str] = []
    run = point.config.run_folder
    weights = (model_of(run) or {}).get("sha256")  # None: an earlier release wrote the model
    for folder, marker in evaluations(run):
        if weights and (marker["model"] or {}).get("sha256") != weights:
            unread.append(f"{folder} is of other weights than model/ holds now; evaluate again")
            continue
        for name in (*marker["tasks"], "alignment"):
            document = object_in(folder / name / METRICS)
            try:
                if document is None or not same(document, marker):
                    raise ValueError
                found += _of_task(point, folder / name, document)
            except (AttributeError, LookupError, TypeError, ValueError):
                unread.append(f"{folder / name / METRICS} is missing, damaged or of another evaluation; evaluate again")
    return found, unread


def absence(sweep: Sweep, point: Point) -> str:
    """Why a point has no figures, or not all: from its status files, else from what its folder lacks."""
    run = point.config.run_folder
    for step in sweep.steps():
        found = status.read(run / "stages" / f"{step}.json")
        if found and found.state == "failed":
            return f"{step} failed: {found.cause or 'without a word'}"
        if found and found.state == "stopped":
            return f"{step} was stopped, since {found.since}"
        if found and found.state == "running":
            return f"{step} began at {found.since}, and has not recorded its end"
    if not (run / "config.yaml").exists():
        return "not trained"
    return "not evaluated" if (run / "model").exists() else "not trained to its end, or not consolidated"


def _of_task(point: Point, folder: Path, document: Document) -> Iterator[Measured]:
    shards, settings, own = document["shards"], document["settings"], settings_of(point.config)
    departs = {key: value for key, value in settings.items() if key not in NO_MATTER and value != own.get(key)}
    images = ImageSet(
        str(shards["digest"]), str(shards["split"]), tuple((key, json.dumps(departs[key])) for key in sorted(departs))
    )
    alignment = folder.name == "alignment"
    own_task = not alignment and folder.name not in TASKS
    definition = json.dumps(document["definition"], sort_keys=True) if own_task else ""
    for row in document["rows"] if alignment else shown_rows(document):
        protocol = POINTING if alignment else label_of(str(row["protocol"]), row.get("fraction"), row.get("draw", 0))
        unit = str(row.get("unit", "image"))
        column = Column(images, folder.name, protocol, str(row["model"]), unit, definition)
        estimates = _pointed(row) if alignment else row["metrics"]
        yield Measured(
            point,
            column,
            folder,
            ", ".join(str(one["name"]) for one in shards["folders"]),
            {"title": "Local alignment", "binary": False, "images": document["findings"]} | document
            if alignment
            else document,
            {name: _estimate(one) for name, one in estimates.items()},
            (document["model"] or {}).get("step"),
            datetime.fromtimestamp((folder.parent / MARKER).stat().st_mtime).astimezone(),
        )


def _pointed(row: Document) -> Document:
    """The figures of pointing. Where there were no strict hits yet, box AUC was that of whole patches: another one."""
    names = POINTED if "strict_hit_rate" in row else ["hit_rate"]
    return {name: row[name] for name in names}


def _estimate(given: Document) -> Document:
    """Raises `LookupError` or `ValueError` for what is no estimate."""
    for key in ("value", "low", "high"):
        if given[key] is not None:
            float(given[key])
    return {"reason": None, "resamples": 0, **given}
