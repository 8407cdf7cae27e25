"""The report of a sweep: report.html, report.md, report.csv and report-methods.csv in its folder.

They show what the points' folders hold (`mama.compare.results_table`), and never fail for a point that lacks something.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mama.compare import report_text
from mama.compare.methods import common_settings, shown
from mama.compare.report_text import BOLD, PAIRED, SEEDS
from mama.compare.results_table import TRAINED, ImageSet, Table, results_table
from mama.errors import ConfigError
from mama.evaluate.provenance import object_in
from mama.sweep.names import short
from mama.sweep.sweep import Sweep
from shards.files import atomic_write
from shards.pages import page_template

TEMPLATE = Path(__file__).parent / "templates" / "sweep.html.j2"


@dataclass(frozen=True)
class Code:
    """The versions that points were trained with."""

    version: str | None  # of mama; None from a checkout that is not installed
    commit: str | None
    stack: dict[str, str | None]
    points: list[str]


def write_report(sweep: Sweep) -> tuple[list[Path], str]:
    """Write the report of a sweep; returns its files, the page first, and the main table as text.

    Raises `ConfigError` if the sweep has no folder yet.
    """
    if not sweep.folder.is_dir():
        raise ConfigError(f"{sweep.folder}: no such folder; the sweep has not begun, run mama sweep first")
    table = results_table(sweep)
    pages = {
        "report.html": _page(table),
        "report.md": report_text.markdown(table),
        "report.csv": report_text.figures_csv(table),
        "report-methods.csv": report_text.methods_csv(table),
    }
    for name, text in pages.items():
        atomic_write(sweep.folder / name, text.encode())
    return [sweep.folder / name for name in pages], report_text.terminal(table)


def _page(table: Table) -> str:
    sweep = table.sweep
    common, others = common_settings(sweep)
    axes = {axis: short(axis) for method in table.methods for axis in method.settings}
    codes = _codes(sweep)
    times = sorted(one.when for one in table.measured)
    steps: dict[int | None, set[str]] = defaultdict(set)
    for one in table.measured:
        steps[one.step].add(one.point.name)
    return page_template(TEMPLATE, title=report_text.title, count=report_text.count, shown=shown).render(
        difference_parts=report_text.difference_parts,
        p_value=report_text.p_value,
        table=table,
        sweep=sweep,
        date=_date(datetime.now().astimezone()),
        evaluated=[_date(time) for time in (times[0], times[-1])] if times else None,
        metrics=[metric for metric in table.metrics() if any(table.columns(images, metric) for images in table.sets)],
        models=list(dict.fromkeys(c.model for _, c, _ in table.cells if c.model != TRAINED)),
        axes=axes if len(axes) > 1 else {},
        seeds=sorted({point.config.seed for point in sweep.points}),
        baselines=sorted({cell.baseline for cell in table.cells.values() if cell.baseline}),
        common=common,
        others=others,
        codes=codes,
        steps=steps,
        missing=table.missing_by_reason(),
        facts={images: _facts(table, images) for images in table.sets},
        notes=(BOLD, SEEDS, PAIRED),
    )


def _facts(table: Table, images: ImageSet) -> dict[str, Any]:
    """Of a set of images: the numbers by task, and whether they are synthetic."""
    of_set = [one for one in table.measured if one.column.images == images and one.column.model == TRAINED]
    folders = [folder for one in of_set for folder in one.task["shards"]["folders"]]
    tasks = {one.column.task: one.task for one in of_set}
    return {"tasks": tasks, "phantoms": any(folder["source"] == "phantom" for folder in folders)}


def _codes(sweep: Sweep) -> list[Code]:
    """The points by the code and the stack that they were trained with, most points first."""
    grouped: dict[str, Code] = {}
    for point in sweep.points:
        environment = object_in(point.config.run_folder / "environment.json")
        if environment is None:
            continue
        stack = dict(environment.get("versions") or {})
        version, commit = stack.pop("mama-clip", None), environment.get("commit")
        stack["Python"] = environment.get("python")
        key = str((version, commit, sorted(stack.items())))
        grouped.setdefault(key, Code(version, commit, stack, [])).points.append(point.name)
    return sorted(grouped.values(), key=lambda code: -len(code.points))


def _date(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z")
