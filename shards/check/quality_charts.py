"""The charts of the quality page: labels from the manifest, image and patient facts from the studies, per split."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shards.read.manifest import Manifest
from shards.schema import SPLITS, Study

UNKNOWN = "unknown"
ROWS = 12  # of one chart; rarer values are summed up
BINS, EXACT = 8, 4  # numbers get about BINS bins if there are more than EXACT values
FACTS = {  # name in the manifest's histograms -> heading
    "view": "View",
    "vendor": "Vendor",
    "density": "Density",
    "birads": "BI-RADS",
    "cancer": "Cancer",
    "pathology": "Pathology",
}
IMPLANT = {None: UNKNOWN, False: "no implant", True: "implant"}
WORDS = {"cancer": {"true": "cancer", "false": "no cancer"}}

Counts = dict[str, Counter[str]]  # split -> value -> number


@dataclass(frozen=True)
class Cell:
    """The count of one value in one split."""

    count: int
    share: float  # of the split
    width: float  # of the bar in percent


@dataclass(frozen=True)
class Row:
    """One value of a fact."""

    value: str
    known: bool
    cells: tuple[Cell, ...]  # one per split


@dataclass(frozen=True)
class Chart:
    """The distribution of one fact over the splits."""

    title: str
    unit: str  # what is counted
    splits: tuple[str, ...]
    rows: tuple[Row, ...]


def chart(title: str, unit: str, counts: Mapping[str, Mapping[str, int]], words: Mapping[str, str] = {}) -> Chart:
    """A chart of split -> value -> count; bars are shares of a split, so splits of different sizes can be compared.

    `words` renames values.
    """
    splits = tuple(split for split in SPLITS if counts.get(split))
    sums = {split: max(1, sum(counts[split].values())) for split in splits}
    total = sum((Counter(counts[split]) for split in splits), Counter[str]())
    shown = {value for value, _ in total.most_common(ROWS)}
    rows = [(value, [counts[split].get(value, 0) for split in splits]) for value in sorted(shown, key=_order)]
    if rest := total.keys() - shown:
        rows.append((f"{len(rest)} more", [sum(counts[split].get(value, 0) for value in rest) for split in splits]))
    most = max((n / sums[split] for _, row in rows for split, n in zip(splits, row, strict=True)), default=1) or 1
    words = {UNKNOWN: "not known", **words}

    def cells(row: list[int]) -> tuple[Cell, ...]:
        shares = [n / sums[split] for split, n in zip(splits, row, strict=True)]
        return tuple(Cell(n, share, 100 * share / most) for n, share in zip(row, shares, strict=True))

    return Chart(
        title, unit, splits, tuple(Row(words.get(value, value), value != UNKNOWN, cells(row)) for value, row in rows)
    )


def label_charts(manifest: Manifest) -> list[Chart]:
    """A chart for each fact of the manifest's histograms."""
    charts = []
    for name, title in FACTS.items():
        if counts := {split: facts[name] for split, facts in manifest.labels.items() if name in facts}:
            charts.append(chart(title, "images", counts, WORDS.get(name, {})))
    return charts


def study_charts(studies: Iterable[Study]) -> tuple[list[Chart], list[Chart]]:
    """(charts of the images, charts of patients and exams); a fact that no study has gets no chart."""
    numbers: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    words: dict[str, Counts] = defaultdict(lambda: defaultdict(Counter))
    seen = set()
    for study in studies:
        for view in study.views:
            numbers["stored"][study.split].append(max(view.size))
            numbers["original"][study.split].append(max(view.original_size))
            spacing = view.pixel_spacing
            words["spacing"][study.split][f"{spacing[0] * 1000:.0f} µm" if spacing else UNKNOWN] += 1
            intent = (view.presentation_intent or UNKNOWN).lower()
            words["intent"][study.split][f"{intent}, rendered" if view.processed else intent] += 1
            words["implant"][study.split][IMPLANT[view.implant]] += 1
            for finding in view.findings:
                words["finding"][study.split][finding.kind + (" with box" if finding.box else ", no box")] += 1
        words["images"][study.split][str(len(study.views))] += 1
        words["reason"][study.split][study.reason or UNKNOWN] += 1
        if study.patient not in seen:
            seen.add(study.patient)
            words["age"][study.split][_decade(study.age)] += 1
            words["race"][study.split][study.race or UNKNOWN] += 1
            words["ethnicity"][study.split][study.ethnicity or UNKNOWN] += 1
    pictures = [
        chart("Long side, original", "images", _binned(numbers["original"])),
        chart("Long side, stored", "images", _binned(numbers["stored"])),
        *_if_known("Pixel spacing, original", "images", words["spacing"]),
        *_if_known("Presentation intent", "images", words["intent"]),
        chart("Images of a study", "studies", words["images"]),
        *_if_known("Findings", "findings", words["finding"]),
        *_if_known("Implants", "images", words["implant"]),
    ]
    people = [
        *_if_known("Age", "patients", words["age"]),
        *_if_known("Race", "patients", words["race"]),
        *_if_known("Ethnicity", "patients", words["ethnicity"]),
        *_if_known("Reason of the exam", "studies", words["reason"]),
    ]
    return pictures, people


def _if_known(title: str, unit: str, counts: Counts) -> list[Chart]:
    known = any(value != UNKNOWN for values in counts.values() for value in values)
    return [chart(title, unit, counts)] if known else []


def _decade(age: int | None) -> str:
    return UNKNOWN if age is None else f"{age // 10 * 10}–{age // 10 * 10 + 9}"


def _binned(numbers: Mapping[str, Iterable[float | None]]) -> dict[str, Counter[str]]:
    """Counts of pixel numbers: of each value if there are few, else in bins of a round width."""
    values = {int(value) for split in numbers.values() for value in split if value is not None}
    if len(values) <= EXACT:
        return {split: Counter(f"{value} px" for value in column) for split, column in numbers.items()}
    width = _round_up((max(values) - min(values)) / BINS)

    def bin_of(value: float | None) -> str:
        start = int(value or 0) // width * width
        return f"{start}–{start + width - 1} px"

    return {split: Counter(map(bin_of, column)) for split, column in numbers.items()}


def _round_up(width: float) -> int:
    """The next larger of 10, 20, 50, 100, ..."""
    power = 10 ** max(1, math.floor(math.log10(max(width, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def _order(value: str) -> tuple[bool, float, str]:
    """Sort key: numbers by size, then texts alphabetically, unknown last."""
    number = re.match(r"\d+", value)
    return value == UNKNOWN, float(number[0]) if number else math.inf, value
