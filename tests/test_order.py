"""The data order is a pure function of the seed and the global index, however the work is shared."""

from __future__ import annotations

import numpy as np
import pytest

from mama import order
from mama.config import ConfigError, TrainConfig


def gathered(world_size: int, micro: int, steps: range) -> list[list[int]]:
    """What all ranks together hold in each step."""
    ranks = [list(order.micro_batches(steps, 12, micro, r, world_size)) for r in range(world_size)]
    per_step = 12 // (micro * world_size)
    return [
        sorted(i for rank in ranks for batch in rank[s * per_step : (s + 1) * per_step] for i in batch)
        for s in range(len(steps))
    ]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (2, 3), (3, 4), (3, 2)])
def test_global_batches_do_not_depend_on_ranks(world_size: int, micro: int) -> None:
    assert gathered(world_size, micro, range(4)) == [list(range(12 * s, 12 * s + 12)) for s in range(4)]


def test_a_resume_continues_the_same_sequence() -> None:
    whole = list(order.micro_batches(range(10), 12, 3, 1, 2))
    assert list(order.micro_batches(range(6, 10), 12, 3, 1, 2)) == whole[6 * 2 :]


def test_every_image_is_an_anchor_once_an_epoch_and_epochs_differ() -> None:
    first = [order.image_at(g, 50, seed=1) for g in range(50)]
    second = [order.image_at(g, 50, seed=1) for g in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [order.image_at(g, 50, seed=2) for g in range(50)]


def test_draws_belong_to_the_sample_alone() -> None:
    draws = [order.generator_at(g, seed=3).random() for g in range(5)]
    assert len(set(draws)) == 5
    assert draws[4] == order.generator_at(4, seed=3).random()
    assert draws[4] != np.random.default_rng([3, 4]).random()


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    assert TrainConfig(global_batch=12, micro_batch=3).accumulation(2) == 2
    with pytest.raises(ConfigError, match=r"train\.global_batch: 12 is not a multiple"):
        TrainConfig(global_batch=12, micro_batch=5).accumulation(2)
