"""Retrieval by the local alignment: does the sentence of a finding score its own image above lesion-free ones?

It needs words alone, so that archives without boxes can be measured too. The score of an image is what the objective
makes of the cosines of a sentence with its patches (`loss.local_pooling`). Beside it stand the same targets by the
global embeddings, of the whole text and the whole image, and a control: the sentence of a normal image.

Letters: t targets, l lesion-free images, S distinct sentences, n images, b of a batch, P patches, D shared width,
k patients of the lesion-free images, R weightings of the patients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mama.data import report_text
from mama.data.held_out import Item
from mama.evaluate import detection
from mama.evaluate.any_kind import Sentence
from mama.evaluate.arrays import Flags, Float32s, Float64s, Ints
from mama.evaluate.bootstrap import Bootstrap, Sides, estimate, paired_difference, parts, share
from mama.evaluate.intervals import Part
from mama.evaluate.pointing import Target
from mama.objective.local_alignment import alignment_scores
from mama.settings.schema import Config, LossConfig, Style
from shards.schema import View

OWN, TEXT, NORMAL = "own sentence", "whole text", "normal sentence"
RULE = {
    "lesion_free": "no finding; pathology normal or BI-RADS 1; nothing else that tells of a lesion",
    "auc": "share of the lesion-free images whose score is below that of the target's own image, ties by half",
    OWN: "the visual score of the sentence of the finding: its cosines with the patches, pooled as in training",
    TEXT: "the cosine of the text's global embedding with the image's",
    NORMAL: "the visual score of the sentence that the text would have if the image were normal",
}
NO_NORMAL_IMAGE = "no image of this split is lesion-free by its facts"
NO_TARGET = "no sentence of this split tells a finding"


@dataclass(frozen=True)
class Asked:
    """What is asked, of every image that is read: each distinct sentence once. The default is nothing."""

    sentences: list[Sentence] = field(default_factory=list)
    own: list[int] = field(default_factory=list)  # [t], the number of the sentence of each target
    normal: list[int | None] = field(default_factory=list)  # [t], that of its normal sentence; None: it is cut off
    lesion_free: list[int] = field(default_factory=list)  # rows of the split
    temperature: float | None = None  # of the softmax that pools patches; None: their maximum


def is_lesion_free(view: View) -> bool:
    """Whether an image is normal by its facts, see `RULE`: unknown ones are not."""
    labels = view.labels
    normal = labels.pathology == "normal" or labels.birads == 1
    return normal and not view.findings and detection.is_complete(view)


def ask(
    targets: list[Target],
    items: list[Item],
    style: Style,
    fits: Callable[[tuple[str, ...], int], bool],
    loss: LossConfig,
) -> Asked:
    """The sentences of all targets, and those of their texts if nothing were found; `fits` says which are read.

    Nothing is asked where there is no target or no lesion-free image.
    """
    lesion_free = [row for row, item in enumerate(items) if is_lesion_free(item.view)]
    if not targets or not lesion_free:
        return Asked()
    words = _normal_words([items[row] for row in lesion_free])
    numbers: dict[Sentence, int] = {}
    own = [numbers.setdefault((tuple(one.text), one.sentence), len(numbers)) for one in targets]
    normal: list[int | None] = []
    for target in targets:
        sentence = _normal_sentence(target.item, style, words)
        normal.append(numbers.setdefault(sentence, len(numbers)) if fits(*sentence) else None)
    temperature = loss.local_temperature if loss.local_pooling == "softmax" else None
    return Asked(list(numbers), own, normal, lesion_free, temperature)


def _normal_words(lesion_free: list[Item]) -> str | None:
    """The most frequent text of radiologists for lesion-free images, of several the first in the alphabet."""
    counts = Counter(item.view.report for item in lesion_free if report_text.own_words(item.view))
    return min(counts, key=lambda words: (-counts[words], words or ""), default=None)


def _normal_sentence(item: Item, style: Style, words: str | None) -> Sentence:
    """The text of an image if it were normal, and the sentence that says so.

    Where it has a radiologist's text, it is in the `words` that radiologists have for normal images here.
    """
    own_words = report_text.own_words(item.view)
    labels = replace(item.view.labels, birads=None, cancer=None, pathology="normal")
    view = replace(item.view, findings=(), labels=labels, report=words if own_words else None)
    if own_words:
        style = "report"
    text = report_text.text(item.study, view, style, frozenset(report_text.META))
    return tuple(text), text.index(report_text.findings(view)[0]) if style == "report" else 0


def scores(sentences: list[Tensor], patches: Tensor, temperature: float | None) -> Float32s:
    """Visual scores [b, S] of S `sentences` [D] with the images of `patches` [b, P, D], NaN where none was computed."""
    if not sentences:
        return np.zeros((len(patches), 0), np.float32)
    seen, stacked = ~patches.isnan().any(-1), torch.stack(sentences)[:, None]  # [b, P], [S, 1, D]
    mask = torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device)
    # One image at a time, of its own patches alone.
    found = [
        alignment_scores(stacked, mask, one[None, own], 1, temperature=temperature)[0]
        for one, own in zip(patches, seen, strict=True)
    ]
    return np.asarray(torch.cat(found, 1).t().float().cpu().numpy())


@dataclass(frozen=True)
class Embedded:
    """What a model makes of the images: visual scores [n, S] of those read, and unit embeddings of all of the split.

    `texts` are those of the split's distinct texts.
    """

    scores: Float32s
    images: Float32s
    texts: Float32s


def document(
    models: dict[str, Embedded],
    text_of: Sequence[int],
    asked: Asked,
    rows: Sequence[int],
    targets: list[Target],
    items: list[Item],
    config: Config,
) -> dict[str, Any]:
    """The mean AUC over all targets by each model's scores, with intervals over patients, and by kind of finding.

    `rows` of the split are the images that were read; `text_of` gives the text of each image of the split.
    `difference` is the AUC of the trained model's own sentences minus that of the row, of the same targets.
    """
    of_targets = [target.item.study.patient for target in targets]
    counts = {"targets": len(targets), "patients": len(set(of_targets)), "rule": RULE}
    if not asked.own:
        reason = NO_NORMAL_IMAGE if targets else NO_TARGET
        return counts | {"lesion_free": 0, "rows": [], "strata": [], "normal": [], "reason": reason}
    others = [items[row].study.patient for row in asked.lesion_free]
    compared, names, flags = _Compared(of_targets, others), [], []
    for model, by, among, own, free in _figures(models, text_of, asked, rows, targets):
        compared.add(own, free)
        names.append({"model": model, "by": by})
        flags.append(among)
    kinds = [_kinds(target, config.data.style) for target in targets]
    groups = {kind: np.array([kind in own for own in kinds]) for kind in sorted(set().union(*kinds))}
    found = iter(
        compared.parts(
            [(number, among) for number, among in enumerate(flags)]
            + [(0, among) for among in flags]
            + [(number, among & of_kind) for of_kind in groups.values() for number, among in enumerate(flags)],
            config,
        )
    )
    parts_of_all, ours = list(islice(found, len(names))), list(islice(found, len(names)))

    def described(of_rows: Iterable[Part]) -> list[dict[str, Any]]:
        estimates = (asdict(estimate([part], compared.patients, NO_TARGET)) for part in of_rows)
        return [name | {"auc": one} for name, one in zip(names, estimates, strict=True)]

    whole = described(parts_of_all)
    for row, mine, theirs in list(zip(whole, ours, parts_of_all, strict=True))[1:]:
        row["difference"] = asdict(paired_difference(mine, theirs, compared.patients))
    strata = []
    for kind, of_kind in groups.items():
        patients = {patient for patient, flag in zip(of_targets, of_kind, strict=True) if flag}
        counted = {"by": "kind", "name": kind, "targets": int(of_kind.sum()), "patients": len(patients)}
        strata.append(counted | {"rows": described(islice(found, len(names)))})
    normal = sorted({text[number] for text, number in (asked.sentences[n] for n in asked.normal if n is not None)})
    seen = {"lesion_free": len(others), "lesion_free_patients": len(set(others))}
    return counts | seen | {"rows": whole, "strata": strata, "normal": normal}


def _figures(
    models: dict[str, Embedded], text_of: Sequence[int], asked: Asked, rows: Sequence[int], targets: list[Target]
) -> Iterator[tuple[str, str, Flags, Float32s, Iterator[Float32s]]]:
    """Model, kind of score, the targets that have it [t], and of each its own image's score [t] and the others' [l].

    The trained model and its own sentences come first. A target that has no score has another's.
    """
    place = {row: number for number, row in enumerate(rows)}
    images = [target.row for target in targets]
    at, free = [place[row] for row in images], [place[row] for row in asked.lesion_free]
    every = np.ones(len(targets), bool)
    for name, one in models.items():
        yield name, OWN, every, one.scores[at, asked.own], (one.scores[free, number] for number in asked.own)
    known = np.array([number is not None for number in asked.normal])
    if known.any():
        scores, normal = models["trained"].scores, [number or 0 for number in asked.normal]
        yield "trained", NORMAL, known, scores[at, normal], (scores[free, number] for number in normal)
    for name, one in models.items():
        normal_images = one.images[asked.lesion_free]
        own = np.array([np.einsum("d,d->", one.images[row], one.texts[text_of[row]]) for row in images])
        yield name, TEXT, every, own, (np.einsum("nd,d->n", normal_images, one.texts[text_of[row]]) for row in images)


def _kinds(target: Target, style: Style) -> set[str]:
    """The kinds of the findings that a target's sentence tells, where they are known."""
    view, sentence = target.item.view, target.text[target.sentence]
    if report_text.own_words(view):  # of no finding in particular
        return {finding.kind for finding in view.findings}
    named = report_text.finding_sentences(view, style, target.text)
    return {finding.kind for finding, one in zip(view.findings, named, strict=True) if one == sentence}


class _Compared:
    """Tables of how often each target's own image won against the lesion-free images of each patient."""

    def __init__(self, targets: list[str], others: list[str]) -> None:
        """The patients of the targets [t], and of the lesion-free images [l]."""
        names, number = np.unique(np.asarray(others, dtype=object).astype(str), return_inverse=True)
        self.order = np.argsort(number, kind="stable")
        self.starts = np.flatnonzero(np.diff(number[self.order], prepend=-1))
        self.images: Ints = np.bincount(number)  # [k]
        self.names = [*targets, *names.tolist()]
        self.patients = len(set(self.names))
        self.tables: list[Float64s] = []

    def add(self, own: Float32s, others: Iterable[Float32s]) -> None:
        """A table [t, k] of the scores `own` [t] against those of the lesion-free images [l], by target."""
        rows = []  # one target after the other: of all together the scores may not fit in memory
        for value, one in zip(own, others, strict=True):
            won = np.where(one < value, 1.0, np.where(one == value, 0.5, 0.0))
            rows.append(np.add.reduceat(won[self.order], self.starts))
        self.tables.append(np.stack(rows))

    def parts(self, wanted: list[tuple[int, Flags]], config: Config) -> list[Part]:
        """Of each table by its number, and of the targets flagged [t]: the mean AUC, and that of the resamples.

        A target and a lesion-free image count as often as their patients were drawn, which may be the same one.
        """
        bootstrap = Bootstrap(self.names, config.eval.bootstrap, config.seed)

        def measure(weights: Float64s) -> Float64s:
            of_targets, others = np.split(weights, [len(self.names) - len(self.images)], axis=1)
            images = others @ self.images  # [R]
            found = []
            for number, flags in wanted:
                won = (of_targets[:, flags] @ self.tables[number][flags] * others).sum(1)
                found.append(share(won, of_targets[:, flags].sum(1) * images))
            return np.stack(found)

        none, every = np.zeros(len(self.images), bool), np.ones(len(self.images), bool)
        sides: list[Sides] = [
            (np.concatenate([flags, none]), np.concatenate([np.zeros_like(flags), every])) for _, flags in wanted
        ]
        draws = [measure(weights) for weights in bootstrap]
        return parts(measure(np.ones((1, len(self.names)))), draws, sides, bootstrap)
