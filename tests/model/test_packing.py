"""Sequences in one row: where each token stands, and means by sequence."""

from __future__ import annotations

import pytest
import torch

from mama.model.packing import Packing, padded

CPU = torch.device("cpu")


def test_where_each_token_stands() -> None:
    packing = Packing([2, 1, 3])
    assert packing.segments(CPU).tolist() == [0, 0, 1, 2, 2, 2]
    assert packing.positions(CPU).tolist() == [0, 1, 0, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_are_those_of_each_sequence(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = [2, 1, 1000]
    tokens = torch.randn(1003, 5).to(dtype)
    parts = tokens.double().split(lengths)
    expected = torch.stack([part.mean(0) for part in parts]).to(dtype)
    found = Packing(lengths).mean(tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0.01 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("lengths", [[], [0], [3, 0]])
def test_a_sequence_without_a_token_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"has no token in a sequence"):
        Packing(lengths)


def test_sequences_of_a_row_apart_have_zeros_behind_them() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    apart = padded(rows, [2, 1, 3])
    assert apart.shape == (3, 3, 3)
    parts = rows.split([2, 1, 3])
    for found, own in zip(apart, parts, strict=True):
        assert torch.equal(found[: len(own)], own)
        assert not found[len(own) :].any()
    assert torch.autograd.gradcheck(lambda x: padded(x, [2, 1, 3]), rows)
