"""The order of the data: a pure function of (manifests, seed, global batch size).

A *global sample index* g counts training pairs from the start of the run. Which image it is, and
every random draw made for it, depends on (seed, g) alone. Ranks and loader workers only decide
who computes it, and a resume starts again at a step: so neither changes what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _epoch(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def image_at(index: int, images: int, seed: int) -> int:
    """The image (0 .. images - 1) that global sample `index` anchors; each once an epoch."""
    epoch, position = divmod(index, images)
    return int(_epoch(images, seed, epoch)[position])


def drawn_at(index: int, attempt: int, ends: np.ndarray, seed: int) -> int:
    """The image that global sample `index` draws, with replacement; `ends` [images] are running sums of weights.

    `attempt` counts the images that were drawn for it before and could not be read.
    """
    return pick(ends, np.random.default_rng([seed, index, 2, attempt]).random())


def pick(ends: np.ndarray, share: float) -> int:
    """The first position whose running sum of weights is above a share, in [0, 1), of their total."""
    return int(np.searchsorted(ends, share * ends[-1], side="right"))


def generator_at(index: int, seed: int) -> np.random.Generator:
    """The random numbers of global sample `index`: partner, masking and augmentation.

    The third word keeps them apart from the epochs' permutations and from the draws of images.
    """
    return np.random.default_rng([seed, index, 1])


def micro_batches(steps: range, global_batch: int, micro_batch: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """This rank's micro-batches, as global sample indices, for the given steps.

    Step s holds indices [s G, (s + 1) G). It is cut into runs of micro_batch x world_size, and a
    run into one piece per rank, so that the ranks together always hold consecutive indices.
    """
    for step in steps:
        for start in range(step * global_batch, (step + 1) * global_batch, micro_batch * world_size):
            first = start + rank * micro_batch
            yield list(range(first, first + micro_batch))
