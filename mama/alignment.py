"""Symmetric local alignment (SLA): how well each text's sentences and each image's patches find one another.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119. With C[s, p] the cosine of sentence s and patch p,

    V[i, j] = mean over s in text i of max over p in image j of C[s, p]      visual score
    T[i, j] = mean over p in image j of max over s in text i of C[s, p]      textual score

Letters: T texts, S sentences of the longest, M sentences of all texts, I images, P patches, D width,
c images of a chunk.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def alignment_scores(sentences: Tensor, mask: Tensor, patches: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """V and T, [T, I] each, of unit vectors `sentences` [T, S, D] and `patches` [I, P, D].

    `mask` [T, S] is true where a sentence is; what stands elsewhere is not read. The M x P cosines
    of `chunk` images are in memory at a time, and two bytes for each text and patch are kept for the
    backward pass. Computed and returned in fp32 at least, whatever autocast says: a logit scale of
    100 would show the rounding of bf16. Raises `ValueError` where a text has no sentence.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is less than 1 image")
    counts = mask.sum(1)
    order = counts.argsort(descending=True, stable=True)
    # [S, T]: texts from the longest to the shortest, so that those with an s-th sentence are the first few.
    present = counts[order] > torch.arange(mask.shape[1], device=mask.device)[:, None]
    sizes = present.sum(1).tolist()
    if sizes[0] < len(mask):
        raise ValueError(f"mask: text {int(order[-1])} has no sentence")
    number, place = present.nonzero(as_tuple=True)  # [M] each: every first sentence, every second one, ...
    text = order[place]
    own = mask.int().argsort(dim=1, descending=True, stable=True)  # a text's sentences, then its padding
    dtype = torch.promote_types(torch.promote_types(sentences.dtype, patches.dtype), torch.float32)
    rows = sentences[text, own[text, number]].to(dtype)  # [M, D]
    with torch.autocast(mask.device.type, enabled=False):
        best_patch, textual = _Alignment.apply(rows, patches.to(dtype), sizes, chunk)  # [M, I], [T, I] in `order`
        belongs = text == torch.arange(len(mask), device=mask.device)[:, None]  # [T, M]
        return (belongs.to(dtype) / counts[:, None]) @ best_patch, textual[order.argsort()]


class _Alignment(torch.autograd.Function):
    """The two kinds of maxima from one product of all sentences with the patches of a few images.

    The gradient of a maximum has one entry, so that the gradient of the M x P cosines is put together from the
    places of the maxima, and no cosine is kept or computed again.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, patches: Tensor, sizes: list[int], chunk: int) -> tuple[Tensor, Tensor]:
        """`rows` [M, D], the first sentences of all texts, then the second ones, `sizes` [S] of them."""
        best, where, means, numbers = [], [], [], []
        for images in patches.split(chunk):
            cosines = rows @ images.flatten(0, 1).t()  # [M, c P]
            value, place = cosines.unflatten(1, images.shape[:2]).max(-1)  # [M, c] each
            best.append(value)
            where.append(place)
            value, number = _best_sentence(cosines, sizes)  # [T, c P] each
            means.append(value.unflatten(1, images.shape[:2]).mean(-1))
            numbers.append(number)
        ctx.save_for_backward(rows, patches, torch.cat(where, 1), torch.cat(numbers, 1))
        ctx.sizes, ctx.chunk = sizes, chunk
        return torch.cat(best, 1), torch.cat(means, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, patches, where, numbers = ctx.saved_tensors
        of_best, of_means = gradients[0], gradients[1] / patches.shape[1]  # [M, I], [T, I]
        texts = torch.arange(len(of_means), device=rows.device)[:, None]
        starts = torch.tensor([0, *accumulate(ctx.sizes)][:-1], device=rows.device)  # [S], the first row of each number
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for first in range(0, len(patches), ctx.chunk):
            span = slice(first, first + ctx.chunk)
            images = patches[span]
            count, size, _ = images.shape
            cosines = rows.new_zeros(len(rows), count * size)
            winners = starts[numbers[:, first * size : (first + count) * size].int()] + texts  # [T, c P]
            cosines.scatter_(0, winners, of_means[:, span].repeat_interleave(size, 1))
            offsets = torch.arange(count, device=rows.device) * size
            cosines.scatter_add_(1, where[:, span] + offsets, of_best[:, span])
            of_rows.addmm_(cosines, images.flatten(0, 1))
            of_patches[span] = (cosines.t() @ rows).view_as(images)
        return of_rows, of_patches, None, None


def _best_sentence(cosines: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The maximum over each text's sentences, and its number within the text: [M, N] -> [T, N] each."""
    first, *others = cosines.split(sizes)
    best, number = first.clone(), torch.zeros_like(first, dtype=torch.int16)
    for n, row in enumerate(others, 1):
        here = best[: len(row)]
        number[: len(row)].masked_fill_(row > here, n)
        torch.maximum(here, row, out=here)
    return best, number
