"""Symmetric local alignment (SLA): how well each text's sentences and each image's patches find one another.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119. With C[s, p] the cosine of sentence s and patch p,

    V[i, j] = mean over s in text i of max over p in image j of C[s, p]      visual score
    T[i, j] = mean over p in image j of max over s in text i of C[s, p]      textual score

Letters: T texts, S sentences of the longest, I images, P patches, D width, c images of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def alignment_scores(sentences: Tensor, mask: Tensor, patches: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """V and T, [T, I] each, of unit vectors `sentences` [T, S, D] and `patches` [I, P, D].

    `mask` [T, S] is true where a sentence is; what stands elsewhere is not read. The cosines of all
    sentences with `chunk` images are in memory at a time, and two bytes for each text and patch are
    kept for the backward pass. Computed and returned in fp32 at least, whatever autocast says: a
    logit scale of 100 would show the rounding of bf16. Raises `ValueError` where a text has no
    sentence, on a CPU; a GPU would have to be waited for, and has NaN for its score.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is less than 1 image")
    counts = mask.sum(1, keepdim=True)
    if mask.device.type == "cpu" and not counts.all():
        raise ValueError(f"mask: text {int(counts.argmin())} has no sentence")
    dtype = torch.promote_types(torch.promote_types(sentences.dtype, patches.dtype), torch.float32)
    # Where no sentence is stand zeros, and the maxima leave them out: to drop them, a GPU would have to tell how many.
    rows = sentences.masked_fill(~mask[..., None], 0).flatten(0, 1).to(dtype)
    with torch.autocast(mask.device.type, enabled=False):
        best_patch, textual = _Alignment.apply(rows, patches.to(dtype), mask, chunk)
    return (best_patch.unflatten(0, mask.shape) * mask[..., None]).sum(1) / counts, textual


class _Alignment(torch.autograd.Function):
    """The two kinds of maxima from one product of all sentences with the patches of a few images.

    The gradient of a maximum has one entry: the gradient of the cosines is put together from the places
    of the maxima, and no cosine is kept, or computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, patches: Tensor, mask: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Each sentence's best cosine in each image [T S, I], and T [T, I], of `rows` [T S, D]."""
        ctx.chunk, (images, size, _) = chunk, patches.shape
        nowhere, texts = ~mask[..., None, None], len(mask)
        best_patch = rows.new_empty(len(rows), images)
        patch = torch.empty_like(best_patch, dtype=torch.int64)
        textual = rows.new_empty(texts, images)
        sentence = torch.empty(texts, images, size, dtype=torch.int16, device=rows.device)
        for span in _spans(images, chunk):
            cosines = (rows @ patches[span].flatten(0, 1).t()).unflatten(1, (-1, size))  # [T S, c, P]
            best_patch[:, span], patch[:, span] = cosines.max(-1)
            of_texts = cosines.unflatten(0, mask.shape).masked_fill_(nowhere, float("-inf"))
            best_sentence, sentence[:, span] = of_texts.max(1)  # [T, c, P]
            textual[:, span] = best_sentence.mean(-1)
        ctx.save_for_backward(rows, patches, patch, sentence)
        return best_patch, textual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, patches, patch, sentence = ctx.saved_tensors
        of_best_patch, of_best_sentence = gradients[0], gradients[1] / patches.shape[1]  # [T S, I], [T, I]
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for span in _spans(len(patches), ctx.chunk):
            images, best = patches[span].flatten(0, 1), sentence[:, None, span].long()  # [c P, D], [T, 1, c, P]
            cosines = rows.new_zeros(len(sentence), len(rows) // len(sentence), *best.shape[2:])  # their gradient
            cosines.scatter_(1, best, of_best_sentence[:, None, span, None].expand_as(best))
            cosines = cosines.flatten(0, 1)  # [T S, c, P]
            cosines.scatter_add_(2, patch[:, span, None], of_best_patch[:, span, None])
            of_rows.addmm_(cosines.flatten(1), images)
            of_patches[span] = (cosines.flatten(1).t() @ rows).view_as(patches[span])
        return of_rows, of_patches, None, None


def _spans(count: int, chunk: int) -> list[slice]:
    return [slice(first, first + chunk) for first in range(0, count, chunk)]
