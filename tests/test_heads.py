"""The heads against PyTorch's own layers and small re-computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_ranks import tiny

from mama.config import Config
from mama.heads import BatchNorm
from mama.launch import run_on_ranks

WIDTH = 7
SHARES = (((0, 5), (5, 17)), ((0, 16), (16, 17)), ((0, 17), (17, 17)))  # of 17 rows, on each of two ranks


def rows() -> torch.Tensor:
    return 3 + torch.randn(3, 17, WIDTH, generator=torch.Generator().manual_seed(0))


def measured(norm: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Of an affine norm at some point of its training: its output, every gradient, its statistics."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, WIDTH))
        norm.bias.copy_(torch.linspace(0, 1, WIDTH))
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.square() * torch.linspace(0.1, 1, WIDTH)).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def test_on_one_rank_it_is_batch_norm_1d() -> None:
    mine, theirs = BatchNorm(WIDTH), torch.nn.BatchNorm1d(WIDTH)
    for x in rows():
        for norm in (mine, theirs):
            norm.zero_grad()
        for found, expected in zip(measured(mine, x), measured(theirs, x), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(mine.eval()(x), theirs.eval()(x))
    assert mine.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def by_shares(config: Config) -> list[list[torch.Tensor]]:
    """On two ranks: the same rows as on one, cut in different ways; whole outputs and gradients."""
    from mama.dist import gather, rank, world_size
    from mama.engine import join_ranks

    join_ranks()
    norm, found = BatchNorm(WIDTH), []
    for share, x in zip(SHARES, rows(), strict=True):
        norm.zero_grad()
        start, end = share[rank()]
        y, by_x, by_weight, by_bias, *running = measured(norm, x[start:end])
        whole = torch.zeros(world_size(), 2, 17, WIDTH)
        whole[rank(), 0, start:end], whole[rank(), 1, start:end] = y, by_x
        summed = gather(torch.stack([by_weight, by_bias])[None]).view(2, 2, WIDTH).sum(0)
        found.append(
            [*gather(whole[rank()][None]).view(2, 2, 17, WIDTH).sum(0), *summed, *(r.clone() for r in running)]
        )
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.ranks
def test_on_two_ranks_it_is_batch_norm_1d_of_all_rows() -> None:
    """However they are cut, also where a rank holds one row or none; running statistics too."""
    theirs = torch.nn.BatchNorm1d(WIDTH)
    for found, x in zip(run_on_ranks(by_shares, tiny(2)), rows(), strict=True):
        theirs.zero_grad()
        for mine, expected in zip(found, measured(theirs, x), strict=True):
            torch.testing.assert_close(mine, expected, atol=2e-6, rtol=2e-6)
