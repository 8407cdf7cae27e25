"""Symmetric local alignment (SLA): similarity of texts and images by their best-matching sentences and patches.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119; see docs/METHOD.md, "Objective". With C[s, p] the cosine of sentence s
and patch p,

    V[i, j] = mean over s in text i of max over p in image j of C[s, p]      visual score
    T[i, j] = mean over p in image j of max over s in text i of C[s, p]      textual score

Letters: T texts, S sentences of the longest text, M rows (the sentences of all texts), I images, P patches,
D width, c images of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mama.model.heads import countable


def alignment_scores(sentences: Tensor, mask: Tensor, patches: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """V and T, [T, I] each, of unit vectors `sentences` [T, S, D] and `patches` [I, P, D].

    `mask` [T, S] is true at sentences; `sentences` is not read elsewhere. Memory: the cosines of all sentences with
    `chunk` images at a time, and two bytes per text and patch for the backward pass. Computed and returned in at
    least fp32, also under autocast: a logit scale of 100 would amplify bf16 rounding. A text without a sentence
    raises `ValueError` on a CPU; on a GPU, where checking would force a synchronisation, its visual score is NaN.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is less than 1 image")
    counts = mask.sum(1, keepdim=True)
    dtype = torch.promote_types(torch.promote_types(sentences.dtype, patches.dtype), torch.float32)
    rows, row_numbers = _rows(sentences.to(dtype), mask)
    with torch.autocast(mask.device.type, enabled=False):
        best_patch, textual = _Alignment.apply(rows, patches.to(dtype), row_numbers, chunk)
    return (best_patch[row_numbers] * mask[..., None]).sum(1) / counts, textual


def _rows(sentences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sentences as rows [M, D], and each text's row numbers [T, S], padded with its first so that no maximum changes.

    On a GPU, where counting the sentences would force a synchronisation, the rows include zeros for the padding
    (M = T S); no row number refers to them.
    """
    if countable(mask):
        if not mask.any(1).all():
            raise ValueError(f"mask: text {int(mask.sum(1).argmin())} has no sentence")
        rows, number = sentences[mask], mask.flatten().cumsum(0).view_as(mask) - 1
    else:
        rows = sentences.masked_fill(~mask[..., None], 0).flatten(0, 1)
        number = torch.arange(len(rows), device=mask.device).view_as(mask)
    first = number.gather(1, mask.int().argmax(1, keepdim=True))
    return rows, torch.where(mask, number, first)


class _Alignment(torch.autograd.Function):
    """Both kinds of maxima from one matrix product of all sentences with the patches of a few images.

    The gradient of a maximum has one entry, so the gradient of the cosines is rebuilt from the positions of the
    maxima: no cosine is kept or recomputed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, patches: Tensor, row_numbers: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """The best cosine of each row [M, D] in each image [M, I], and T [T, I]; `row_numbers` is [T, S]."""
        ctx.chunk, (images, size, _) = chunk, patches.shape
        best_patch, patch = rows.new_empty(len(rows), images), row_numbers.new_empty(len(rows), images)
        textual = rows.new_empty(len(row_numbers), images)
        sentence = row_numbers.new_empty(len(row_numbers), images, size, dtype=torch.int16)
        for span in _spans(images, chunk):
            cosines = (rows @ patches[span].flatten(0, 1).t()).unflatten(1, (-1, size))  # [M, c, P]
            best_patch[:, span], patch[:, span] = cosines.max(-1)
            best_sentence, sentence[:, span] = cosines[row_numbers].max(1)  # [T, c, P]
            textual[:, span] = best_sentence.mean(-1)
        ctx.save_for_backward(rows, patches, row_numbers, patch, sentence)
        return best_patch, textual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients of `rows` [M, D] and `patches` [I, P, D]."""
        rows, patches, row_numbers, patch, sentence = ctx.saved_tensors
        of_best_patch, of_best_sentence = gradients[0], gradients[1] / patches.shape[1]  # [M, I], [T, I]
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for span in _spans(len(patches), ctx.chunk):
            images = patches[span].flatten(0, 1)  # [c P, D]
            best = row_numbers.gather(1, sentence[:, span].flatten(1).long()).view_as(sentence[:, span])  # [T, c, P]
            cosines = rows.new_zeros(len(rows), *best.shape[1:])  # their gradient, [M, c, P]
            cosines.scatter_(0, best, of_best_sentence[:, span, None].expand_as(best))
            cosines.scatter_add_(2, patch[:, span, None], of_best_patch[:, span, None])
            of_rows.addmm_(cosines.flatten(1), images)
            of_patches[span] = (cosines.flatten(1).t() @ rows).view_as(patches[span])
        return of_rows, of_patches, None, None


def _spans(count: int, chunk: int) -> list[slice]:
    return [slice(first, first + chunk) for first in range(0, count, chunk)]
