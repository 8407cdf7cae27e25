"""The report of a sweep as text: the table for a terminal and for a paper (Markdown), and two CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mama.compare.measured import POINTED
from mama.compare.methods import Method
from mama.compare.results_table import RESAMPLES, Cell, Column, ImageSet, Table
from mama.evaluate.intervals import Difference
from mama.evaluate.provenance import object_in
from mama.report.page import TITLES

METRIC_TITLES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", **TITLES, **POINTED}
BOLD = (
    "Bold: the best mean of a column, and every other that the patients do not tell from it (the 95 % interval of its "
    "paired difference from the best includes 0)."
)
SEEDS = (
    "± is the standard deviation over seeds (n - 1). Intervals over seeds are Student's t with n - 1 degrees of "
    "freedom; a figure of one seed has an interval over patients."
)
PAIRED = (
    f"Differences from the baseline: {RESAMPLES:,} resamples of the patients, the same for both methods and all their "
    "seeds; in each the figure is averaged over the seeds. 95 % intervals, and p values of single comparisons, not "
    "corrected for their number. They hold for these trainings: what other seeds would change is in ±. DeLong's test "
    "of the difference of two AUCs is in the form for patients with several images (Obuchowski 1997)."
)


def title(metric: str) -> str:
    """The name of a metric for readers."""
    return METRIC_TITLES.get(metric, metric)


def mean_and_sd(cell: Cell | None) -> str:
    """0.912 ± 0.010, with the number of trainings where some are missing."""
    if cell is None:
        return "-"
    if cell.mean is None:
        return "n/a"
    spread = "" if cell.sd is None else f" ± {cell.sd:.3f}"
    return f"{cell.mean:.3f}{spread}{count(cell)}"


def count(cell: Cell) -> str:
    """` (2 of 3 seeds)`, or nothing if all are there."""
    return "" if len(cell.values) == cell.expected else f" ({len(cell.values)} of {cell.expected} seeds)"


def difference_parts(found: Difference) -> dict[str, str]:
    """Value +0.012, interval [-0.003, +0.027] and p = 0.11."""
    p = "no p: a class of one patient" if found.p is None else p_value(found.p)
    return {"value": f"{found.value:+.3f}", "interval": f"[{found.low:+.3f}, {found.high:+.3f}]", "p": p}


def p_value(p: float) -> str:
    """p = 0.11."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.{2 if p >= 0.095 else 3}f}"


def terminal(table: Table) -> str:
    """AUC of the trained models, one line a method, and what is missing."""
    parts = []
    for images, name in table.sets.items():
        if columns := table.columns(images, "auc"):
            parts += ["", f"AUC on {name}"]
            heads = [("", *(c.task for c in columns)), ("", *(c.title for c in columns))]
            parts += _aligned([*heads, *_rows(table, images, columns)])
    if not parts:
        parts = ["no point has been evaluated yet"]
    elif any(cell.bold for cell in table.cells.values()):
        parts += ["", "* the best of a column, or not distinguishable from it; ± over seeds"]
    if table.missing:
        parts += ["", "missing", *(f"  {line}" for line in _missing(table))]
    return "\n".join(parts).lstrip("\n")


def markdown(table: Table) -> str:
    """AUC of the trained models and the differences from the baseline, as tables of Markdown."""
    lines = [f"# {table.sweep.name}", ""]
    for images, name in table.sets.items():
        if not (columns := table.columns(images, "auc")):
            continue
        heads = [_escaped(f"{c.task}, {c.title}") for c in columns]
        lines += [f"AUC on {_escaped(name)}", "", f"| method | seeds | {' | '.join(heads)} |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        for method in table.rows(images, "auc"):
            cells = [table.cells.get((method.name, column, "auc")) for column in columns]
            shown = [f"**{mean_and_sd(cell)}**" if cell and cell.bold else mean_and_sd(cell) for cell in cells]
            lines.append(f"| {_escaped(method.name)} | {len(method.points)} | {' | '.join(shown)} |")
        lines += [""]
        if pairs := list(_comparisons(table, images, columns)):
            lines += [f"| difference of AUC | {' | '.join(heads)} |", "|---|" + "---|" * len(columns), *pairs, ""]
    lines += [f"{note}  " for note in (BOLD, SEEDS, PAIRED)]
    lines += ["", "Missing:", "", *(f"- {_escaped(line)}" for line in _missing(table))] if table.missing else []
    return "\n".join(lines) + "\n"


def figures_csv(table: Table) -> str:
    """One line for each point, set of images, task, protocol, unit, model and metric, with all digits."""
    method_of = {point.name: method for method in table.methods for point in method.points}
    axes = _axes(table.methods)
    heads = ["sweep", "point", "method", *axes, "seed", *KEYS, "value", "low", "high", "reason", "images", "patients"]
    return _csv([*heads, "step", "commit", "version", "folder"], _figure_lines(table, method_of, axes))


def methods_csv(table: Table) -> str:
    """One line for each method in each column and metric: mean, spread, interval, comparison."""
    axes = _axes(table.methods)
    heads = ["sweep", "method", *axes, *KEYS, "seeds", "points", "mean", "sd", "low", "high", "interval_over", "bold"]
    compared = ["baseline", "difference", "difference_low", "difference_high", "p"]
    return _csv([*heads, *compared, "delong_low", "delong_high", "delong_p", "reason"], _method_lines(table, axes))


KEYS = ("set", "split", "shards_digest", "departs", "task", "protocol", "unit", "model", "metric")


def _figure_lines(table: Table, method_of: dict[str, Method], axes: list[str]) -> Iterator[list[Any]]:
    for one in table.measured:
        environment = object_in(one.point.config.run_folder / "environment.json") or {}
        code = [environment.get("commit"), (environment.get("versions") or {}).get("mama-clip")]
        method = method_of[one.point.name]
        begin = [table.sweep.name, one.point.name, method.name, *(method.value(axis) for axis in axes)]
        for metric, estimate in one.estimates.items():
            yield [
                *(*begin, one.point.config.seed, *_keys(table, one.column, metric)),
                *(estimate["value"], estimate["low"], estimate["high"], estimate["reason"]),
                *(one.task.get("images"), one.task.get("patients"), one.step, *code, one.folder),
            ]


def _method_lines(table: Table, axes: list[str]) -> Iterator[list[Any]]:
    settings = {method.name: [method.value(axis) for axis in axes] for method in table.methods}
    for (name, column, metric), cell in table.cells.items():
        found = cell.against
        compared = [found.value, found.low, found.high, found.p] if found else [None] * 4
        compared += [cell.delong.low, cell.delong.high, cell.delong.p] if cell.delong else [None] * 3
        yield [
            *(table.sweep.name, name, *settings[name], *_keys(table, column, metric)),
            *(len(cell.values), cell.expected, cell.mean, cell.sd, cell.low, cell.high, cell.over, cell.bold),
            *(cell.baseline, *compared, "; ".join(filter(None, (cell.reason, cell.no_comparison)))),
        ]


def _keys(table: Table, column: Column, metric: str) -> list[Any]:
    images = column.images
    departs = " ".join(f"{key}={value}" for key, value in images.departs)
    facts = [table.sets[images], images.split, images.digest, departs]
    return [*facts, column.task, column.protocol, column.unit, column.model, metric]


def _axes(methods: list[Method]) -> list[str]:
    return list(dict.fromkeys(axis for method in methods for axis in method.settings))


def _csv(heads: Sequence[str], lines: Iterable[list[Any]]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([heads, *lines])
    return file.getvalue()


def _rows(table: Table, images: ImageSet, columns: list[Column]) -> Iterator[tuple[str, ...]]:
    for method in table.rows(images, "auc"):
        cells = [table.cells.get((method.name, column, "auc")) for column in columns]
        yield (method.name, *(mean_and_sd(cell) + (" *" if cell and cell.bold else "") for cell in cells))


def _comparisons(table: Table, images: ImageSet, columns: list[Column]) -> Iterator[str]:
    for method in table.rows(images, "auc"):
        cells = [table.cells.get((method.name, column, "auc")) for column in columns]
        names = {cell.baseline for cell in cells if cell and cell.baseline}
        for name in names:
            shown = [_against(cell) for cell in cells]
            yield f"| {_escaped(f'{method.name} - {name}')} | {' | '.join(map(_escaped, shown))} |"


def _against(cell: Cell | None) -> str:
    if cell is None or cell.against is None:
        return "-" if cell is None else cell.no_comparison or cell.reason or "-"
    parts = difference_parts(cell.against)
    by_delong = f"; DeLong: {p_value(cell.delong.p)}" if cell.delong and cell.delong.p is not None else ""
    return f"{parts['value']} {parts['interval']}, {parts['p']}{by_delong}"


def _missing(table: Table) -> list[str]:
    return [f"{what}: {', '.join(places)}" for what, places in table.missing_by_reason().items()]


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip() for line in lines]


def _escaped(text: str) -> str:
    """Text in a cell of Markdown."""
    return "".join(f"\\{c}" if c in "|*_<>`[]\\" else c for c in text)
