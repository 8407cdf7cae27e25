"""report.html: what a run was, how it learned and what was measured, in one file that asks nothing of the network.

It reads what the run folder holds (config, environment.json, log.jsonl, eval/, eval-on/) and takes pictures
from the shards; it computes no figure of its own. A part that is not there is said so in words, and what was
measured on other images than the run's own has a heading of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np

from mama.evaluate import provenance
from mama.evaluate.provenance import Document
from mama.evaluate.results import shown, untaught_note
from mama.report import figures
from mama.report.evaluation_section import evaluation
from mama.run.portable import folder_name
from mama.settings.schema import Config, ConfigError
from shards.files import atomic_write
from shards.pages import page_template
from shards.read.reader import load_manifest
from shards.read.remote import local_folder
from shards.schema import ShardError

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
METRICS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "probabilistic_f1": "probabilistic F1",
    "specificity_at_sensitivity": "specificity at 80 % sensitivity",
}


def write_report(config: Config, run: Path) -> Path:
    """Write `<run>/report.html` from what is there; returns its path."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no such run folder; train first")
    path, data = run / "report.html", _data(config)
    try:
        page = _page(config, run, data)
    except (AttributeError, LookupError, TypeError, ValueError, jinja2.UndefinedError) as error:
        reason = f"was edited or damaged ({type(error).__name__}: {error})"
        raise ConfigError(f"{run}: a JSON file in it {reason}; run `mama eval` again") from error
    atomic_write(path, page.encode())
    return path


def _page(config: Config, run: Path, data: list[Document]) -> str:
    model = provenance.model_of(run)
    evaluations = [evaluation(config, run, model, *found) for found in provenance.evaluations(run)]
    own = next((one for one in evaluations if one["own"]), None)
    return page_template(TEMPLATE, estimate=shown, untaught_note=untaught_note).render(
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
        metric_names=METRICS,
        curves=_curves(config, run),
    )


def _unmarked(run: Path) -> bool:
    """Are there results of a release that did not say what it had measured?"""
    return not (run / "eval" / provenance.MARKER).exists() and any((run / "eval").glob("*/metrics.json"))


def _data(config: Config) -> list[Document]:
    """The folders that `data.shards` names, as they are now, each with a row for each split or why it has none."""
    folders: list[Document] = []
    for address in config.data.shards:
        try:
            manifest = load_manifest(local_folder(address, config.data.cache_folder))
        except ShardError:
            folders.append({"name": folder_name(address), "splits": []})
        else:
            folders.append({"source": manifest.source, "splits": provenance.counts(manifest)})
    return folders


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
    """The lines of a log, but for one that is being written or was torn."""
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)
