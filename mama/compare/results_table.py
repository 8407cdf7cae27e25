"""The numbers of a sweep's report: of each method in each column the mean over seeds, and paired comparisons.

**Over seeds**: mean, standard deviation (n - 1), and Student's t interval with n - 1 degrees of freedom, cut at 0 and
1. With the two to five trainings that people can pay for, normal quantiles and a bootstrap over seeds give intervals
that are too short. It tells how far another set of trainings would lie, on the same patients. A method of one seed has
the interval of that evaluation, over patients.

**Paired comparison**: patients are resampled, the same for both methods and all their seeds; in each resample the
figure is averaged over the seeds (`mama.evaluate.intervals.difference`). It tells whether other patients would show
the same difference between these very trainings, and holds nothing about other seeds. For the AUC of two classes
DeLong's test (`mama.evaluate.comparison`) says the same without resampling.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from scipy.special import stdtrit

from mama.compare.measured import POINTING, Column, ImageSet, Measured, absence, measurements
from mama.compare.methods import Method, baseline_of, methods
from mama.errors import ConfigError
from mama.evaluate import metrics
from mama.evaluate.bootstrap import Bootstrap
from mama.evaluate.comparison import delong
from mama.evaluate.intervals import LEVEL, Difference, Part, difference
from mama.evaluate.results import Scored, predictions_file, read_predictions
from mama.sweep.sweep import Sweep
from shards.progress import progress

RESAMPLES, SEED = 1000, 0  # of the paired comparisons
# The predictions.csv of an earlier release has six digits: a few equal scores may be ties, or ties equal scores.
ROUNDING = 0.005
TRAINED = "trained"


@dataclass
class Cell:
    """One method in one column, by one metric."""

    values: list[float]  # of its trainings
    expected: int  # number of its trainings, measured or not
    mean: float | None = None
    sd: float | None = None  # None for a single training
    low: float | None = None
    high: float | None = None
    over: str = ""  # what the interval is over: "seeds" or "patients"
    reason: str = ""  # why the mean or the interval is missing
    baseline: str = ""  # the name of the method that it is compared with
    against: Difference | None = None
    delong: Difference | None = None  # the same difference by DeLong's test: AUC of two classes
    no_comparison: str = ""  # why not
    bold: bool = False  # the best, or not distinguishable from it


@dataclass
class Table:
    """Everything that the pages of the report show."""

    sweep: Sweep
    methods: list[Method]
    measured: list[Measured]
    sets: dict[ImageSet, str]  # title of each set of images
    cells: dict[tuple[str, Column, str], Cell] = field(default_factory=dict)  # by method's name, column, metric
    missing: list[tuple[str, str]] = field(default_factory=list)  # point or place, and what is missing and why

    def columns(self, images: ImageSet, metric: str, model: str = TRAINED) -> list[Column]:
        """The columns of a set of images that have the metric, by task and protocol in the order of measurement."""
        found = dict.fromkeys(c for _, c, m in self.cells if (c.images, c.model, m) == (images, model, metric))
        tasks = list(dict.fromkeys(column.task for column in found))
        return sorted(found, key=lambda column: tasks.index(column.task))

    def metrics(self) -> list[str]:
        """AUC first, then those of every task, then those of some."""
        return list(dict.fromkeys(["auc", "balanced_accuracy", *metrics.REASONS, *(m for _, _, m in self.cells)]))

    def rows(self, images: ImageSet, metric: str, model: str = TRAINED) -> list[Method]:
        """The methods with a figure in one of those columns; for trained models also those without any figure."""
        columns = self.columns(images, metric, model)
        somewhere = {name for name, _, _ in self.cells} if model == TRAINED else {m.name for m in self.methods}
        has = {m.name for m in self.methods if any((m.name, column, metric) in self.cells for column in columns)}
        return [m for m in self.methods if m.name in has or m.name not in somewhere]

    def missing_by_reason(self) -> dict[str, list[str]]:
        """What is missing -> the points that lack it."""
        grouped: dict[str, list[str]] = defaultdict(list)
        for place, what in self.missing:
            grouped[what].append(place)
        return dict(grouped)


def results_table(sweep: Sweep) -> Table:
    """Read every evaluation of the sweep's points, and compare them. A point without figures is named, not an error."""
    table = Table(sweep, methods(sweep), [], {})
    for point in sweep.points:
        found, unread = measurements(point)
        table.measured += found
        table.missing += [(point.name, sentence) for sentence in unread]
    table.sets = _titles(table.measured)
    by_column: dict[Column, dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    method_of = {point.name: method for method in table.methods for point in method.points}
    for one in table.measured:
        by_column[one.column][method_of[one.point.name].name].append(one)
    for column, rows in progress(by_column.items(), len(by_column), "comparing the methods", "columns"):
        for method in table.methods:
            for metric in dict.fromkeys(name for one in rows[method.name] for name in one.estimates):
                table.cells[method.name, column, metric] = _summary(rows[method.name], metric, len(method.points))
        _compare(table, column, {name: row for name, row in rows.items() if row})
    table.missing += _absent(table)
    names = {point.name for point in sweep.points}
    left = sorted(path.parent.name for path in sweep.folder.glob("*/point.json") if path.parent.name not in names)
    table.missing += [(name, "left out: it is no point of the sweep any more") for name in left]
    return table


def _summary(row: list[Measured], metric: str, expected: int) -> Cell:
    estimates = [one.estimates[metric] for one in row if metric in one.estimates]
    values = [float(one["value"]) for one in estimates if one["value"] is not None]
    cell = Cell(values, expected)
    if not values:
        cell.reason = str(estimates[0]["reason"])
    elif len(values) == 1:
        alone = next(one for one in estimates if one["value"] is not None)
        cell.mean, cell.low, cell.high, cell.over = values[0], alone["low"], alone["high"], "patients"
        cell.reason = str(alone["reason"] or "")
    else:
        cell.mean, cell.sd, cell.over = float(np.mean(values)), float(np.std(values, ddof=1)), "seeds"
        half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * cell.sd / len(values) ** 0.5
        cell.low, cell.high = max(0.0, cell.mean - half), min(1.0, cell.mean + half)
    return cell


def _compare(table: Table, column: Column, rows: dict[str, list[Measured]]) -> None:
    """Fill in the comparisons of a column with the baseline, and which figures are bold."""
    drawn = _Drawn(rows) if column.model == TRAINED and len(rows) > 1 else None
    for method in table.methods:
        base, why = baseline_of(method, table.sweep, table.methods)
        for metric in table.metrics():
            if (cell := table.cells.get((method.name, column, metric))) is None or cell.mean is None:
                continue
            cell.baseline, cell.no_comparison = (base.name if base else ""), why
            if base and drawn:
                cell.against, cell.no_comparison = drawn.difference(method.name, base.name, metric)
                cell.delong = drawn.delong(method.name, base.name) if metric == "auc" and cell.against else None
    for metric in table.metrics():
        cells = {name: table.cells.get((name, column, metric)) for name in rows}
        means = {name: cell.mean for name, cell in cells.items() if cell and cell.mean is not None}
        if not drawn or len(means) < 2:
            continue
        sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
        best = max(means, key=lambda name: sign * means[name])
        for name in means:
            behind = None if name == best else drawn.difference(name, best, metric)[0]
            cell = cells[name]
            assert cell
            cell.bold = means[name] == means[best] or bool(behind and behind.low <= 0 <= behind.high)


class _Drawn:
    """The figures of the methods in one column, on the same resampled patients."""

    def __init__(self, rows: dict[str, list[Measured]]) -> None:
        self.trainings: dict[str, list[dict[str, list[Part]]]] = {}
        self.scored: dict[str, list[Scored]] = {}
        self.refused: dict[str, str] = {}
        self.binary = all(bool(one.task["binary"]) for row in rows.values() for one in row)
        self.first: tuple[str, Scored] | None = None
        for name, row in rows.items():
            try:
                self.scored[name] = [self._read(one) for one in row]
                self.trainings[name] = [self._draw(*both) for both in zip(row, self.scored[name], strict=True)]
            except ConfigError as error:
                self.refused[name] = str(error)

    def difference(self, ours: str, theirs: str, metric: str) -> tuple[Difference | None, str]:
        """The mean of one method minus that of another; None, and why, if they cannot be compared."""
        for name in (ours, theirs):
            if name in self.refused:
                return None, self.refused[name]
            if name not in self.trainings:
                return None, f"{name} has no figure here"
            if any(metric not in parts for parts in self.trainings[name]):
                return None, "no comparison of this figure from predictions.csv"
        sides = [[parts[metric] for parts in self.trainings[name]] for name in (ours, theirs)]
        if any(np.isnan(part.value) for side in sides for training in side for part in training):
            return None, "the figure of a training is undefined"
        found = difference(*sides)
        return found, "" if found else "too few patients: it rests on the images of one"

    def delong(self, ours: str, theirs: str) -> Difference | None:
        """The difference of the AUCs of two classes; the methods must be comparable (`difference`)."""
        mine, other = ([one.scores[:, 1] for one in self.scored[name]] for name in (ours, theirs))
        same = self.scored[ours][0]
        return delong(same.labels, mine, other, same.patients) if self.binary else None

    def _read(self, one: Measured) -> Scored:
        """Raises `ConfigError` for predictions that are of other images."""
        if one.column.protocol == POINTING:
            raise ConfigError("its hits are not on file image by image")
        file = one.folder / predictions_file(one.column.unit)
        scored = read_predictions(file, one.column.protocol, one.column.model)
        self.first = self.first or (one.point.name, scored)
        if not scored.same_images(self.first[1]):
            raise ConfigError(f"{file}: is not of the images, patients and labels of {self.first[0]}")
        return scored

    def _draw(self, one: Measured, scored: Scored) -> dict[str, list[Part]]:
        """Raises `ConfigError` for predictions that do not give the figures on file."""
        file = one.folder / "predictions.csv"
        bootstrap = Bootstrap(scored.patients, RESAMPLES, SEED)
        drawn = metrics.drawn_parts(scored.labels, scored.scores, bootstrap, self.binary)
        for metric, parts in drawn.items():
            if metric not in one.estimates:
                continue
            value, again = one.estimates[metric]["value"], float(np.mean([part.value for part in parts]))
            if (value is None) != np.isnan(again) or (value is not None and abs(value - again) > ROUNDING):
                raise ConfigError(f"{file}: gives {metric} {again:.3f}, and metrics.json has {value}; evaluate again")
        return drawn


def _titles(measured: list[Measured]) -> dict[ImageSet, str]:
    """The names of the folders of shards, the split, and where needed what tells two sets apart."""
    names = {one.column.images: f"{one.set_name}, {one.column.images.split}" for one in measured}
    titles: dict[ImageSet, str] = {}
    for images, name in names.items():
        if any(o.digest != images.digest and other == name for o, other in names.items()):
            name += f" ({images.digest[:8]})"
        departs = ", ".join(f"{key}={value}" for key, value in images.departs)
        titles[images] = f"{name}, evaluated with {departs}" if departs else name
    return titles


def _absent(table: Table) -> list[tuple[str, str]]:
    """What each point lacks of the columns that others with its shards have."""
    trained = [one for one in table.measured if one.column.model == TRAINED]
    missing = []
    for point in table.sweep.points:
        own = {one.column for one in trained if one.point is point}
        if not own:
            missing.append((point.name, absence(table.sweep, point)))
            continue
        like = {one.column for one in trained if one.point.config.data.shards == point.config.data.shards}
        # Without the local term there is nothing that could point.
        if lacking := {c for c in like - own if c.protocol != POINTING or point.config.loss.local}:
            what = sorted(f"{c.task}, {c.title} on {table.sets[c.images]}" for c in lacking)
            missing.append((point.name, f"{absence(table.sweep, point)}: no {'; no '.join(what)}"))
    return missing
