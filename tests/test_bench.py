"""The benchmarks at a small size: what they print is what was computed. No figure of time is tested."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from test_alignment import MASK, inputs, loop

from mama.bench_loss import looped_scores, measure
from mama.cli import cli


def table(result: Result) -> dict[str, float]:
    """The rows of a Markdown table of two columns."""
    assert result.exit_code == 0, result.output
    rows = [re.split(r" *\| *", line.strip("| ")) for line in result.output.splitlines()]
    return {name: float(value) for name, value in rows[2:]}


def test_the_loop_of_the_benchmark_computes_the_same_scores() -> None:
    sentences, patches = inputs(torch.float64)
    for got, wanted in zip(looped_scores(sentences, MASK, patches), loop(sentences, MASK, patches), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_bench_loss_prints_both_times_and_that_both_agree() -> None:
    result = CliRunner().invoke(cli, ["bench", "loss", "--rounds", "1", "--pairs", "2"])
    rows = table(result)
    assert result.output.startswith("| local term, 2 pairs, 1,369 patches, ")
    seconds = [value for name, value in rows.items() if name.startswith("forward and backward")]
    assert len(seconds) == 2
    assert rows["ratio"] == pytest.approx(seconds[1] / seconds[0], rel=0.02)
    differences = {name.split(" (")[0]: value for name, value in rows.items() if "difference" in name}
    assert differences["difference of the losses"] < 1e-6
    assert differences["largest difference of the gradients"] < 1e-6


def test_the_measured_loss_is_the_mean_of_four_cross_entropies() -> None:
    """(CE(scale V) + CE(scale T)) / 2, each the mean of both directions, with the scale at its start."""
    generator = torch.Generator().manual_seed(2)
    v, t = (torch.randn(5, 5, generator=generator) for _ in range(2))
    x = torch.zeros(5, 1, 1), torch.ones(5, 1, dtype=torch.bool), torch.zeros(5, 1, 1)

    def scores(sentences: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grows = sentences.sum() + patches.sum()
        return v + grows, t + grows

    seconds, loss, gradients = measure(scores, *x)
    expected = []
    for table in (v.numpy() / 0.07, t.numpy() / 0.07):
        for rows in (table, table.T):
            expected.append(np.mean(np.log(np.exp(rows - rows.max()).sum(1)) + rows.max() - np.diag(rows)))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    assert seconds > 0
    assert [g.shape for g in gradients] == [x[0].shape, x[2].shape]
