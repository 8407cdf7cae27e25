"""The heads against PyTorch's own layers and small re-computations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mama.model.heads import BatchNorm
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from tests.support.tiny_model import model_of, tiny

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
    from mama.runtime.collectives import gather, rank, world_size
    from mama.train.deepspeed_engine import join_ranks

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
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def batch_norm(x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """By its formula, over all but the last dimension."""
    flat = x.flatten(0, -2)
    y = (x - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    return y if weight is None or bias is None else y * weight + bias


def test_published_heads_compute_what_the_authors_code_computes() -> None:
    """View head: no biases, an affine norm at its end, one view at once; local heads: none there, one text at once."""
    config = tiny(1)
    model = model_of(replace(config, heads=replace(config.heads, norm="published"))).double()
    assert model.view_head is not None
    assert model.patch_head is not None
    assert model.sentence_head is not None
    for parameter in model.parameters():  # norms start at 1 and 0, where an affine one is like one that is not
        torch.nn.init.normal_(parameter, std=0.3)
    views, patches, sentences = torch.randn(6, 24), torch.randn(3, 8, 24), torch.randn(3, 4, 24)
    views, patches, sentences = views.double(), patches.double(), sentences.double()
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True] * 3 + [False]])

    head = dict(model.view_head.named_parameters())
    assert sorted(head) == ["0.weight", "1.bias", "1.weight", "3.weight", "4.bias", "4.weight"]
    for found, view in zip(model.view_rows(views).chunk(2), views.chunk(2), strict=True):
        hidden = batch_norm(view @ head["0.weight"].T, head["1.weight"], head["1.bias"]).relu()
        expected = batch_norm(hidden @ head["3.weight"].T, head["4.weight"], head["4.bias"])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def local(rows: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        head = dict(module.named_parameters())
        assert sorted(head) == ["0.bias", "0.weight", "1.bias", "1.weight", "3.bias", "3.weight"]
        hidden = batch_norm(rows @ head["0.weight"].T + head["0.bias"], head["1.weight"], head["1.bias"]).relu()
        return batch_norm(hidden @ head["3.weight"].T + head["3.bias"])

    torch.testing.assert_close(
        model.patch_rows(patches.flatten(0, 1)).unflatten(0, (3, -1)),
        local(patches, model.patch_head),
        atol=1e-5,
        rtol=1e-5,
    )
    found = model.sentence_rows(sentences, mask)
    for row, own, text in zip(found, mask, sentences, strict=True):
        torch.testing.assert_close(row[own], local(text[own], model.sentence_head), atol=1e-5, rtol=1e-5)
        assert not row[~own].any()


def test_a_text_of_one_sentence_leaves_no_trace_in_published_norms() -> None:
    """It has no spread: its norm gives the bias, and a gradient of 0; the running statistics stay numbers."""
    norm = BatchNorm(WIDTH, alone=True)
    assert norm.bias is not None
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(1, WIDTH, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()
    assert torch.equal(y[0], norm.bias)
    assert x.grad is not None
    assert not x.grad.any()
    assert norm.running_var.isfinite().all()
