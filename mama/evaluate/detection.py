"""Detection: boxes marked in every image of a split from the map of any kind of lesion, against all boxes.

No mark is told what its image shows. Letters: n images, l lesions, m marks, gh x gw patches, R weightings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mama.data.images import BACKGROUND
from mama.evaluate.arrays import Flags, Float32s, Float64s, Ints
from mama.evaluate.bootstrap import Bootstrap, Sides, estimate, parts
from mama.evaluate.boxes import NONE, Lesion, Stratum, centres_inside, marks, matched, overlaps, strata
from mama.evaluate.froc import above, average_precision, sensitivities
from mama.evaluate.pointing import BRIGHTEST
from mama.settings.schema import Config
from shards.schema import View

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # false positives an image
OVERLAPS = (0.1, 0.25, 0.5)  # intersection over union
CURVE = tuple(float(rate) for rate in np.geomspace(1 / 16, 8, 57))  # points of the figure
RULE = {
    "map": "the highest cosine of a patch with a sentence about a lesion, of the kinds that have boxes in this split, "
    "minus its cosine with the sentence that there is none",
    "box": "around each local maximum above the map's median over tissue, the connected patches from half way between "
    "the median and it on that no higher one has; score: the maximum",
    "hit": "the centre of the marked box lies in the box of the lesion",
    "false_positives": "marks that hit no lesion, an image, over all images",
}
NO_LESION = "there is no lesion"
RANDOM = "random map"
OWN_ROWS = ("trained", "untrained", BRIGHTEST, RANDOM)

Marks = tuple[Float64s, Float64s]  # of an image: boxes [m, 4] in pixels of the canvas, and scores [m]


@dataclass(frozen=True)
class Searched:
    """The images in which lesions are looked for, with the patient and the lesions of each."""

    patients: list[str]
    lesions: list[tuple[Lesion, ...]]


def is_complete(view: View) -> bool:
    """Whether the boxes of an image are all there, so that a mark elsewhere is false.

    Every finding has a box; or there is none, and neither cancer, pathology nor a BI-RADS category but 1 or 2 tells of
    one.
    """
    if view.findings:
        return all(finding.box for finding in view.findings)
    labels = view.labels
    suspicious = labels.cancer or labels.pathology in ("benign", "malignant") or labels.birads not in (None, 1, 2)
    return not suspicious


def document(boxes: dict[str, list[Marks]], searched: Searched, config: Config) -> dict[str, Any]:
    """FROC and average precision of the marked `boxes` of each model in each image, also by kind, size
    and pathology of lesion.

    `boxes` may be of any origin, in pixels of the canvas. Marks and false positives are the same for every stratum;
    its lesions are counted alone, and a mark that finds another one counts neither for nor against it.
    """
    found = [lesion for of_image in searched.lesions for lesion in of_image]
    counts = {
        "images": len(searched.patients),
        "without_lesion": sum(not of_image for of_image in searched.lesions),
        "patients": len(set(searched.patients)),
        "lesions": len(found),
        "rule": RULE,
    }
    if not found:
        return counts | {"reason": "no lesion of this split has a box", "rows": [], "strata": []}
    kept = strata(found)
    rows: list[list[dict[str, Any]]] = [[] for _ in kept]
    for name, of_images in boxes.items():
        marked = _match(of_images, searched)
        for into, figures in zip(rows, _figures(marked, searched, kept, config), strict=True):
            into.append({"model": name} | figures)
        rows[0][-1] |= {"marks": len(marked.scores), "curve": _curve(marked, len(searched.patients))}
    parts_of = [
        {"by": one.by, "name": one.name, "lesions": sum(map(one.holds, found)), "rows": own}
        for one, own in zip(kept, rows, strict=True)
    ]
    return counts | {"rows": rows[0], "strata": parts_of[1:]}


def boxes_of_maps(
    maps: dict[str, Float32s], grey: Float32s, size: tuple[int, int], seed: int
) -> dict[str, list[Marks]]:
    """The boxes that each model's maps [n, gh, gw] mark in each image, all by the same rule.

    Beside them `BRIGHTEST`, whose map are the mean grey values `grey` [n, gh, gw], and `RANDOM`, whose patches have
    random values.
    """
    random = np.random.default_rng(seed).random(grey.shape, dtype=np.float32)
    return {
        name: [marks(*of_image, size) for of_image in zip(values, grey > BACKGROUND, strict=True)]
        for name, values in (maps | {BRIGHTEST: grey, RANDOM: random}).items()
    }


@dataclass(frozen=True)
class _Marked:
    """The marks of all images: `taken` [m] by overlap is the lesion that a mark finds, `best` [l] that of its hits."""

    image: Ints  # [m]
    scores: Float64s  # [m]
    taken: dict[float, Ints]
    best: Float64s  # [l], the highest score among the marks that hit it, else -inf
    false: Flags  # [m], hits no lesion


def _curve(marked: _Marked, images: int) -> dict[str, list[float]]:
    """Points of the FROC up to the false positives of all marks, or to the last rate of `CURVE`."""
    most = min(float(marked.false.sum() / images), CURVE[-1])
    rates = (*(rate for rate in CURVE if rate < most), most)
    false = above(marked.scores[marked.false], np.ones((1, int(marked.false.sum()))), marked.best)
    lesions = np.ones((1, len(marked.best)))
    shares = sensitivities(marked.best, false, lesions, np.array([float(images)]), rates)[:, 0]
    return {"false_positives": list(rates), "sensitivity": shares.tolist()}


def _match(of_images: list[Marks], searched: Searched) -> _Marked:
    image, scores, best, false = [], [], [], []
    taken: dict[float, list[Ints]] = {least: [] for least in OVERLAPS}
    first = 0  # number of the image's first lesion
    for number, ((boxes, of_image), lesions) in enumerate(zip(of_images, searched.lesions, strict=True)):
        true = np.array([lesion.box for lesion in lesions]).reshape(-1, 4)
        hits = centres_inside(boxes, true)  # [m, l]
        overlap = overlaps(boxes, true)
        for least in OVERLAPS:
            own = matched(overlap, of_image, least)
            taken[least].append(np.where(own == NONE, NONE, own + first))
        image.append(np.full(len(of_image), number))
        scores.append(of_image)
        best.append(np.where(hits, of_image[:, None], -np.inf).max(0, initial=-np.inf))
        false.append(~hits.any(1))
        first += len(lesions)
    order = np.argsort(-np.concatenate(scores), kind="stable")  # what is sorted again later is in order already
    return _Marked(
        np.concatenate(image)[order],
        np.concatenate(scores)[order],
        {least: np.concatenate(of_images)[order] for least, of_images in taken.items()},
        np.concatenate(best),
        np.concatenate(false)[order],
    )


def _figures(marked: _Marked, searched: Searched, kept: list[Stratum], config: Config) -> Iterator[dict[str, Any]]:
    """`ap` and `froc` of the lesions of each stratum, with intervals over patients."""
    found = [lesion for of_image in searched.lesions for lesion in of_image]
    flags = [np.array([one.holds(lesion) for lesion in found]) for one in kept]
    at = np.repeat(np.arange(len(searched.lesions)), [len(of_image) for of_image in searched.lesions])
    weighted = np.concatenate([np.arange(len(searched.patients)), at, marked.image])  # images, lesions, marks
    bootstrap = Bootstrap([searched.patients[row] for row in weighted], config.eval.bootstrap, config.seed)

    def measure(weights: Float64s) -> Float64s:
        images, lesions, of_marks = np.split(
            weights, [len(searched.patients), len(searched.patients) + len(at)], axis=1
        )
        return _measure(marked, flags, images.sum(1), lesions, of_marks)

    point, draws = measure(np.ones((1, len(weighted)))), [measure(weights) for weights in bootstrap]
    count = len(OVERLAPS) + len(RATES)
    before, after = np.zeros(len(searched.patients), bool), np.zeros(len(marked.image), bool)
    sides: list[Sides] = [(np.concatenate([before, own, after]),) for own in flags for _ in range(count)]
    drawn = parts(point, draws, sides, bootstrap)
    for start in range(0, len(drawn), count):
        own = [asdict(estimate([part], bootstrap.patients, NO_LESION)) for part in drawn[start : start + count]]
        yield {
            "ap": dict(zip(map(str, OVERLAPS), own, strict=False)),
            "froc": [
                {"false_positives": rate, "sensitivity": one}
                for rate, one in zip(RATES, own[len(OVERLAPS) :], strict=True)
            ],
        }


def _measure(marked: _Marked, flags: list[Flags], images: Float64s, lesions: Float64s, of_marks: Float64s) -> Float64s:
    """Average precisions and sensitivities, of the lesions that each of the `flags` [l] holds, [8 flags, R].

    `images` [R], `lesions` [R, l] and `of_marks` [R, m] are weights. What takes long is summing those of all marks, of
    which a detector may have a hundred an image: that is done once for all flags.
    """
    false = above(marked.scores[marked.false], of_marks[:, marked.false], marked.best)
    true = [np.flatnonzero(taken != NONE) for taken in marked.taken.values()]
    of_all = np.split(
        above(marked.scores, of_marks, marked.scores[np.concatenate(true)]),
        np.cumsum([len(one) for one in true])[:-1],
        1,
    )
    found = []
    for own in flags:
        total = lesions[:, own].sum(1)
        for taken, marks_, all_marks in zip(marked.taken.values(), true, of_all, strict=True):
            mine = own[taken[marks_]]
            counted, others = marks_[mine], marks_[~mine]
            passed_over = above(marked.scores[others], of_marks[:, others], marked.scores[counted])
            weights = of_marks[:, counted], all_marks[:, mine] - passed_over
            found.append(average_precision(marked.scores[counted], *weights, total)[None])
        found.append(sensitivities(marked.best[own], false[:, own], lesions[:, own], images, RATES))
    return np.concatenate(found)
