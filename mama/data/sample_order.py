"""The order of the training data: a pure function of (manifests, seed, global batch size).

A *global sample index* g counts training pairs from the start of the run. Its image and every random number
drawn for it depend on (seed, g) alone. So neither the number of ranks and loader workers nor a resume changes
the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _epoch(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def image_at(index: int, images: int, seed: int) -> int:
    """The anchor image (0 .. images - 1) of global sample `index`, without replacement: each image once an epoch."""
    epoch, position = divmod(index, images)
    return int(_epoch(images, seed, epoch)[position])


def drawn_at(index: int, attempt: int, ends: np.ndarray, seed: int) -> int:
    """The anchor image of global sample `index`, drawn with replacement.

    `ends` [images] are the cumulative weights; `attempt` counts the unreadable images drawn before for this sample.
    """
    return pick(ends, np.random.default_rng([seed, index, 2, attempt]).random())


def pick(ends: np.ndarray, share: float) -> int:
    """The first position whose cumulative weight in `ends` exceeds `share`, in [0, 1), of their total."""
    return int(np.searchsorted(ends, share * ends[-1], side="right"))


def generator_at(index: int, seed: int) -> np.random.Generator:
    """The random generator of global sample `index`: partner, masking and augmentation.

    The third element of its seed separates it from the permutations of epochs and from `drawn_at`.
    """
    return np.random.default_rng([seed, index, 1])


def micro_batches(steps: range, global_batch: int, micro_batch: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """This rank's micro-batches for `steps`, as global sample indices.

    Step s has the indices [s G, (s + 1) G) for a global batch of G. They are cut into runs of micro_batch x
    world_size, and each run into one micro-batch per rank: together the ranks always hold consecutive indices.
    """
    for step in steps:
        for start in range(step * global_batch, (step + 1) * global_batch, micro_batch * world_size):
            first = start + rank * micro_batch
            yield list(range(first, first + micro_batch))
