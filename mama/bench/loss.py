"""`mama bench loss`: the local term, forward and backward, with both poolings, beside the published loop over texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mama.objective.local_alignment import alignment_scores
from mama.objective.losses import info_nce
from mama.settings.schema import LossConfig

# Patches of 14 pixels in 518 x 518, and the sentences of a structured report.
PATCHES, WIDTH, FEWEST, MOST = 1369, 512, 8, 13

Scores = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Measured = tuple[float, Tensor, tuple[Tensor, ...]]  # seconds, loss, gradients


def bench_loss(rounds: int, pairs: int) -> Iterator[str]:
    """Time all in turn for `pairs` pairs, `rounds` times after a first one; yield a table in Markdown of medians."""
    chunk, temperature = LossConfig().local_chunk, LossConfig().local_temperature
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = _embeddings(pairs, device)
    ours, theirs = partial(alignment_scores, chunk=chunk), looped_scores
    softly = partial(ours, temperature=temperature)
    turns = [[measure(scores, *data) for scores in (ours, theirs, softly)] for _ in range(rounds + 1)]
    mine, other, soft = ([turn[side][0] for turn in turns[1:]] for side in range(3))
    (_, loss, gradients), (_, loop_loss, loop_gradients), _ = turns[-1]
    apart = max(float((a - b).abs().max()) for a, b in zip(gradients, loop_gradients, strict=True))
    largest = max(float(g.abs().max()) for g in loop_gradients)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield f"| local term, {pairs} pairs, {PATCHES:,} patches, {int(data[1].sum())} sentences, fp32, {where} | |"
    yield "|---|---|"
    yield f"| forward and backward, {chunk} images at a time, s | {statistics.median(mine):.3g} |"
    yield f"| forward and backward, a loop over texts, s | {statistics.median(other):.3g} |"
    yield f"| ratio | {statistics.median(b / a for a, b in zip(mine, other, strict=True)):.2f} |"
    yield f"| forward and backward, loss.local_pooling=softmax, s | {statistics.median(soft):.3g} |"
    yield f"| its ratio to max | {statistics.median(b / a for a, b in zip(mine, soft, strict=True)):.2f} |"
    yield f"| difference of the losses ({float(loop_loss):.4f}) | {abs(float(loss - loop_loss)):.1e} |"
    yield f"| largest difference of the gradients (at most {largest:.1e}) | {apart:.1e} |"


def looped_scores(sentences: Tensor, mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return V and T [T, I] as published: one text after the other against the patches of all images.

    `sentences` [T, S, D], their `mask` [T, S], `patches` [I, P, D].
    """
    visual, textual = [], []
    for text, own in zip(sentences, mask, strict=True):
        cosines = patches @ text[own].t()  # [I, P, S of this text]
        visual.append(cosines.amax(1).mean(1))
        textual.append(cosines.amax(2).mean(1))
    return torch.stack(visual), torch.stack(textual)


def measure(scores: Scores, sentences: Tensor, mask: Tensor, patches: Tensor) -> Measured:
    """Return seconds for L_local = (CE(scale V) + CE(scale T)) / 2 and its gradients, the loss, and the gradients."""
    leaves = sentences.clone().requires_grad_(), patches.clone().requires_grad_()
    targets, scale = torch.eye(len(mask), device=mask.device), LossConfig().initial_scale
    _wait(mask.device)
    started = time.perf_counter()
    visual, textual = scores(leaves[0], mask, leaves[1])
    loss = (info_nce(scale * visual, targets) + info_nce(scale * textual, targets)) / 2
    gradients = torch.autograd.grad(loss, leaves)
    _wait(mask.device)
    return time.perf_counter() - started, loss.detach(), gradients


def _embeddings(pairs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit vectors, the same each time: sentences [T, S, D], their mask [T, S], patches [I, P, D]."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(FEWEST, MOST + 1, (pairs, 1), generator=generator)
    sentences = torch.randn(pairs, MOST, WIDTH, generator=generator)
    patches = torch.randn(pairs, PATCHES, WIDTH, generator=generator)
    vectors = [F.normalize(x, dim=-1).to(device) for x in (sentences, patches)]
    return vectors[0], (torch.arange(MOST) < counts).to(device), vectors[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
