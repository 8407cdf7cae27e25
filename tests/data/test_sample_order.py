"""The data order is a pure function of the seed and the global index, however the work is shared."""

from __future__ import annotations

import numpy as np
import pytest

from mama.data import sample_order
from mama.errors import ConfigError
from mama.settings.schema import TrainConfig


def gathered(world_size: int, micro: int, steps: range) -> list[list[int]]:
    """What all ranks together hold in each step."""
    ranks = [list(sample_order.micro_batches(steps, 12, micro, r, world_size)) for r in range(world_size)]
    per_step = 12 // (micro * world_size)
    return [
        sorted(i for rank in ranks for batch in rank[s * per_step : (s + 1) * per_step] for i in batch)
        for s in range(len(steps))
    ]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 3), (2, 6), (2, 3), (3, 4), (3, 2)])
def test_global_batches_do_not_depend_on_ranks(world_size: int, micro: int) -> None:
    assert gathered(world_size, micro, range(4)) == [list(range(12 * s, 12 * s + 12)) for s in range(4)]


def test_a_resume_continues_the_same_sequence() -> None:
    whole = list(sample_order.micro_batches(range(10), 12, 3, 1, 2))
    assert list(sample_order.micro_batches(range(6, 10), 12, 3, 1, 2)) == whole[6 * 2 :]


def test_every_image_is_an_anchor_once_an_epoch_and_epochs_differ() -> None:
    first = [sample_order.image_at(g, 50, seed=1) for g in range(50)]
    second = [sample_order.image_at(g, 50, seed=1) for g in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [sample_order.image_at(g, 50, seed=2) for g in range(50)]


def test_the_epochs_are_these_permutations() -> None:
    """The order is a promise: a run that was begun with it continues with it."""
    expected = np.stack([np.random.default_rng([4, epoch]).permutation(7) for epoch in range(3)])
    assert [sample_order.image_at(g, 7, seed=4) for g in range(21)] == expected.ravel().tolist()


def test_weighted_draws_keep_the_weights_and_belong_to_the_sample_alone() -> None:
    ends = np.cumsum([0.0, 1.0, 0.0, 3.0, 0.0])
    draws = [sample_order.drawn_at(g, 0, ends, seed=1) for g in range(4000)]
    counts = np.bincount(draws, minlength=5) / 4000
    np.testing.assert_allclose(counts, [0, 0.25, 0, 0.75, 0], atol=5 * 0.45 / 4000**0.5)
    assert sample_order.drawn_at(77, 0, ends, seed=1) == draws[77]
    for other in (
        [sample_order.drawn_at(g, 1, ends, 1) for g in range(200)],
        [sample_order.drawn_at(g, 0, ends, 2) for g in range(200)],
    ):
        assert abs(np.mean(np.equal(other, draws[:200])) - (0.25**2 + 0.75**2)) < 0.2, "another draw"
    assert [sample_order.pick(ends, share) for share in (0.0, 0.2499, 0.25, 1 - 2**-53)] == [1, 1, 3, 3]


def test_draws_belong_to_the_sample_alone() -> None:
    draws = [sample_order.generator_at(g, seed=3).random() for g in range(5)]
    assert len(set(draws)) == 5
    assert draws[4] == sample_order.generator_at(4, seed=3).random()
    assert draws[4] != np.random.default_rng([3, 4]).random()


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    assert TrainConfig(global_batch=12, micro_batch=3).accumulation(2) == 2
    with pytest.raises(ConfigError, match=r"train\.global_batch: 12 is not a multiple"):
        TrainConfig(global_batch=12, micro_batch=5).accumulation(2)
