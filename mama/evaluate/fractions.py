"""Fractions of the training labels: draws of patients, a smaller fraction inside of every larger one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from mama.evaluate.arrays import Ints
from mama.settings.schema import EvalConfig


def draws(config: EvalConfig) -> Iterator[tuple[float, int]]:
    """Each fraction and draw of `eval.fractions` and `eval.draws`; of all labels there is one draw."""
    for fraction in config.fractions:
        yield from ((fraction, number) for number in range(1 if fraction == 1 else config.draws))


def label_of(protocol: str, fraction: float | None, draw: int) -> str:
    """The protocol with the share of the labels that it was given, where that is not all: "linear probe, 10 % (0)"."""
    return protocol if fraction is None or fraction == 1 else f"{protocol}, {100 * fraction:g} % ({draw})"


def seed_of(seed: int, draw: int) -> int:
    """The seed of draw number `draw` in a run with `seed`."""
    return int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])


def drawn(patients: Sequence[str], labels: Ints, fraction: float, seed: int) -> Ints:
    """The rows, ascending, of a `fraction` in (0, 1] of the patients of n labelled images; at 1 all of them.

    A patient is drawn with all images. All fractions take the first patients of one order, so that they are nested. It
    depends on names, labels and `seed` alone, not on the order of rows: first one patient of each class, from the
    rarest class on, then the others by the hash of their names. Where a fraction has fewer patients than that takes,
    it gets them all the same: nothing can be learned of a class without an example.
    """
    if fraction == 1:
        return np.arange(len(labels))
    names = np.asarray(patients, dtype=object).astype(str)
    order = sorted(set(names.tolist()), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    cover = _cover(names, labels, order)
    size = max(len(cover), round(fraction * len(order)))
    chosen = [*cover, *(name for name in order if name not in cover)][:size]
    return np.flatnonzero(np.isin(names, chosen))


def _cover(names: np.ndarray, labels: Ints, order: Sequence[str]) -> list[str]:
    """The first patient in `order` of each class that no earlier one has, from the class of fewest patients on."""
    with_class = {int(k): set(names[labels == k].tolist()) for k in np.unique(labels)}
    cover: list[str] = []
    for k in sorted(with_class, key=lambda k: (len(with_class[k]), k)):
        if not with_class[k] & set(cover):
            cover.append(next(name for name in order if name in with_class[k]))
    return cover
