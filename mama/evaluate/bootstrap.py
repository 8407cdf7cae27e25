"""Estimates with 95 % intervals (`mama.evaluate.intervals`) from a bootstrap over patients.

A figure is computed for many weightings of the images at once: all ones for the estimate, and for a resample the number
of times that each image's patient was drawn. A figure that a weighting leaves undefined is NaN in these arrays, and
`None` with a reason in an `Estimate`, never 0. Letters: n images, R weightings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mama.evaluate.arrays import Flags, Float64s, Ints
from mama.evaluate.intervals import Part, difference, interval

Sides = tuple[Flags, ...]  # the images [n] that a figure rests on; of two sides the rarer one counts

CELLS = 4_000_000  # at most, of the [R, n] arrays held at once
HELD = 16_000_000  # counts of drawn patients, at most, that are kept for the next figure (128 MB)
NO_IMAGE = "there is no image"


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, from the `resamples` in which the figure is defined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    resamples: int = 0
    reason: str | None = None  # why `value` or the interval is missing


class Bootstrap:
    """Weightings [r, n] of the resamples, in pieces of bounded size.

    Patients are drawn with replacement, each with all images: images of one patient resemble each other, so that
    drawing images would make the intervals too short.
    """

    def __init__(self, patients: list[str], resamples: int, seed: int) -> None:
        names, self.patient_of = np.unique(np.asarray(patients, dtype=object).astype(str), return_inverse=True)
        self.patients, self.resamples, self.seed = len(names), resamples, seed

    def count(self, images: Flags) -> int:
        """Number of patients of these images [n]."""
        return len(np.unique(self.patient_of[images]))

    def __iter__(self) -> Iterator[Float64s]:
        for drawn in self._drawn():
            yield drawn[:, self.patient_of].astype(np.float64)

    def sums(self, columns: Float64s) -> tuple[Float64s, Float64s]:
        """Sums of `columns` [n, C] over all images [C], and over those of each resample [R, C].

        They are added up by patient first, which takes a small part of the time that weightings of images do.
        """
        if not self.patients:
            return np.zeros(columns.shape[1]), np.zeros((0, columns.shape[1]))
        order = np.argsort(self.patient_of, kind="stable")
        starts = np.flatnonzero(np.diff(self.patient_of[order], prepend=-1))
        of_patient: Float64s = np.add.reduceat(columns[order], starts)
        drawn = [drawn.astype(np.float64) @ of_patient for drawn in self._drawn()]
        return columns.sum(0), np.concatenate([of_patient[:0], *drawn])

    def shares(self, pairs: list[tuple[Flags, Flags]]) -> list[Part]:
        """For each pair of flags [n]: the share of the images `whole` that is in `part`, NaN where there is none."""
        flags = np.stack([one for part, whole in pairs for one in (part & whole, whole)], axis=1).astype(np.float64)
        point, drawn = self.sums(flags)
        return [
            Part(float(share(point[[i]], point[[i + 1]])[0]), share(drawn[:, i], drawn[:, i + 1]), self.count(whole))
            for i, (_, whole) in zip(range(0, 2 * len(pairs), 2), pairs, strict=True)
        ]

    def _drawn(self) -> Iterator[Ints]:
        """How often each patient was drawn [r, patients], in pieces."""
        piece = max(1, CELLS // max(1, len(self.patient_of)))
        sizes = [min(piece, self.resamples - start) for start in range(0, self.resamples, piece)]
        if self.patients * self.resamples > HELD:
            rng = np.random.default_rng(self.seed)
            yield from (_multinomial(rng, self.patients, size) for size in sizes)
        else:
            yield from np.split(_kept(self.patients, self.resamples, self.seed), np.cumsum(sizes[:-1], dtype=int))


@lru_cache(maxsize=2)
def _kept(patients: int, resamples: int, seed: int) -> Ints:
    """The same draws serve all figures of as many patients: drawing them takes as long as half of the figures do."""
    drawn = _multinomial(np.random.default_rng(seed), patients, resamples)
    drawn.flags.writeable = False
    return drawn


def _multinomial(rng: np.random.Generator, patients: int, resamples: int) -> Ints:
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples)


def share(part: Float64s, whole: Float64s) -> Float64s:
    """`part` / `whole`, NaN where that is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean(values: Float64s, patients: list[str], resamples: int, seed: int) -> Estimate:
    """The mean over images of `values` [n] in [0, 1], for example hits of 0 and 1."""
    if not len(values):
        return Estimate(None, reason=NO_IMAGE)
    bootstrap = Bootstrap(patients, resamples, seed)
    return estimate(_means(values[None], bootstrap), bootstrap.patients, NO_IMAGE)


def mean_difference(ours: Float64s, theirs: Float64s, patients: list[str], resamples: int, seed: int) -> Estimate:
    """The mean of `ours` [n] minus that of `theirs`, in [0, 1] and of the same images, each with the same draws."""
    if not len(ours):
        return Estimate(None, reason=NO_IMAGE)
    bootstrap = Bootstrap(patients, resamples, seed)
    one, other = _means(np.stack([ours, theirs]), bootstrap)
    return paired_difference(one, other, bootstrap.patients)


def paired_difference(ours: Part, theirs: Part, patients: int) -> Estimate:
    """A figure minus another one on images of so many patients, each with the same draws of these."""
    found = difference([[ours]], [[theirs]])
    if found is None:
        why = "they are of one patient" if patients < 2 else "there are fewer than two resamples"
        return Estimate(ours.value - theirs.value, reason=f"no interval: {why}")
    return Estimate(found.value, found.low, found.high, len(ours.draws))


def _means(values: Float64s, bootstrap: Bootstrap) -> list[Part]:
    """Of each row of `values` [m, n]."""
    draws = [values @ weights.T / weights.sum(1) for weights in bootstrap]
    every_image = (np.ones(values.shape[1], bool),)
    return parts(values.mean(1)[:, None], draws, [every_image] * len(values), bootstrap)


def parts(point: Float64s, draws: list[Float64s], sides: list[Sides], bootstrap: Bootstrap) -> list[Part]:
    """A figure's parts: `point` [parts, 1] on all images, `draws` [parts, r] in pieces of the resamples."""
    drawn = np.concatenate([point[:, :0], *draws], axis=1)
    return [
        Part(float(whole[0]), of_part, min(map(bootstrap.count, own)))
        for whole, of_part, own in zip(point, drawn, sides, strict=True)
    ]


def estimate(drawn: list[Part], patients: int, reason: str) -> Estimate:
    """The mean of a figure's parts on images of so many patients.

    `reason`: why the figure is undefined, if it is.
    """
    value = float(np.mean([part.value for part in drawn]))
    if np.isnan(value):
        return Estimate(None, reason=reason)
    if patients < 2:
        return Estimate(value, reason="no interval: the images are of one patient")
    defined = int((~np.isnan([part.draws for part in drawn])).all(0).sum())
    if defined < 2:
        return Estimate(value, reason="no interval: fewer than two resamples define the metric")
    limits = interval(drawn)
    if limits is None:
        return Estimate(value, reason="no interval: it rests on the images of one patient")
    return Estimate(value, *limits, defined)
