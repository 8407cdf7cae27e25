"""report.html: settings, training curves and results of a run in one file that needs no network.

It shows what the run folder holds (config, environment.json, log.jsonl, eval/, eval-on/) and pictures from the shards,
and computes no figure of its own. The page names every part that is missing; results on other images than the run's
own test split have headings of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np

from mama.errors import ConfigError
from mama.evaluate import provenance, result_folders
from mama.evaluate.fractions import label_of
from mama.evaluate.provenance import Document
from mama.evaluate.results import format_estimate, unmentioned_note
from mama.report import figures
from mama.report.evaluation_section import evaluation
from mama.run.portable import folder_name
from mama.settings.schema import Config
from shards.errors import ShardError
from shards.files import atomic_write
from shards.from_json import from_json
from shards.pages import page_template
from shards.read.manifest import SplitBy, load_manifest
from shards.read.remote import local_folder

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
TITLES = {  # of the metrics of a task of two classes
    "average_precision": "average precision",
    "brier": "Brier score",
    "ece": "ECE",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "probabilistic_f1": "probabilistic F1",
    "specificity_at_sensitivity": "specificity at 80 % sensitivity",
}
POINT_TITLES = {  # of the metrics of an operating point
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "recall_rate": "recall rate",
}
TERMS = {  # of the loss, as log.jsonl names them
    "view": "the two images of a pair against those of other pairs",
    "anchor_text": "the first image of a pair against the report texts",
    "partner_text": "the second image of a pair against the report texts",
    "local": "patches of an image against sentences of the report texts",
}
FACTS = {"density": "density", "birads": "BI-RADS", "pathology": "pathology"}


def write_report(config: Config, run: Path, model: Path | None = None) -> Path:
    """Write `<run>/report.html` from what the run folder holds; returns its path.

    `model` is the model folder, if it is not that of the run.

    Raises `ConfigError` without a run folder, or if a JSON file in it was edited or damaged.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: no such run folder; train first")
    path, data = run / "report.html", _data(config)
    try:
        page = _page(config, run, model or run, data)
    except (AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        reason = f"was edited or damaged ({type(error).__name__}: {error})"
        raise ConfigError(f"{run}: a JSON file in it {reason}; run `mama eval` again") from error
    atomic_write(path, page.encode())
    return path


def _page(config: Config, run: Path, model: Path, data: list[Document]) -> str:
    now = provenance.model_of(model)
    evaluations = [evaluation(config, run, now, *found) for found in result_folders.evaluations(run)]
    own = next((one for one in evaluations if one["own"]), None)
    filters = {"estimate": format_estimate, "unmentioned_note": unmentioned_note, "protocol_title": _protocol}
    return page_template(TEMPLATE, **filters, decided=_decided).render(
        name=config.name,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        config=config,
        environment=provenance.object_in(run / "environment.json"),
        own=own,
        others=[one for one in evaluations if one is not own],
        unmarked=_unmarked(run),
        data=data,
        phantoms=any(one["phantoms"] for one in evaluations)
        or (not evaluations and any("phantom" in f.values() for f in data)),
        metric_titles=TITLES,
        point_titles=POINT_TITLES,
        fact_titles=FACTS,
        loss_terms=TERMS,
        curves=_curves(config, run),
    )


def _unmarked(run: Path) -> bool:
    """Whether eval/ has results of an early release, which did not record what was measured."""
    folder = run / "eval"
    return not (folder / result_folders.MARKER).exists() and any(folder.glob(f"*/{result_folders.METRICS}"))


def _protocol(row: Document) -> str:
    return label_of(row["protocol"], row.get("fraction"), row.get("draw", 0))


def _data(config: Config) -> list[Document]:
    """The folders in `data.shards` as they are now, each with a row per split; without rows if it cannot be read."""
    folders: list[Document] = []
    for address in config.data.shards:
        try:
            manifest = load_manifest(local_folder(address, config.data.cache_folder))
        except ShardError:
            folders.append({"name": folder_name(address), "splits": []})
        else:
            split_by = asdict(manifest.split_by) if manifest.split_by else None
            folders.append({"source": manifest.source, "splits": provenance.counts(manifest), "split_by": split_by})
    return folders


def _decided(folder: Document) -> str:
    """What decided the splits of a folder; empty where its manifest or the evaluation does not say."""
    recorded = folder.get("split_by")
    return str(from_json(SplitBy, recorded)) if recorded else ""


def _curves(config: Config, run: Path) -> Document | None:
    records = list(_records(run / "log.jsonl"))
    if not records:
        return None
    rates = [record["pairs_per_second"] for record in records if "pairs_per_second" in record]
    return {
        "figure": figures.training_curves(records, config.loss.local_start),
        "steps": records[-1]["step"] + 1,
        "pairs_per_second": float(np.median(rates)) if rates else None,
    }


def _records(log: Path) -> Iterator[Document]:
    """The lines of log.jsonl, without one that is being written or was cut off."""
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)
