"""Symmetric local alignment (SLA): how well each text's sentences and each image's patches find one another.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119. With C[s, p] the cosine of sentence s and patch p,

    V[i, j] = mean over s in text i of max over p in image j of C[s, p]      visual score
    T[i, j] = mean over p in image j of max over s in text i of C[s, p]      textual score

Letters: T texts, S sentences of the longest, M rows for the sentences of all texts, I images, P patches, D width,
c images of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mama.model.heads import countable


def alignment_scores(sentences: Tensor, mask: Tensor, patches: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """V and T, [T, I] each, of unit vectors `sentences` [T, S, D] and `patches` [I, P, D].

    `mask` [T, S] is true where a sentence is; what stands elsewhere is not read. The cosines of all
    sentences with `chunk` images are in memory at a time, and two bytes for each text and patch are
    kept for the backward pass. Computed and returned in fp32 at least, whatever autocast says: a
    logit scale of 100 would show the rounding of bf16. Raises `ValueError` where a text has no
    sentence, on a CPU; a GPU would have to be waited for, and has NaN for its visual score.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is less than 1 image")
    counts = mask.sum(1, keepdim=True)
    dtype = torch.promote_types(torch.promote_types(sentences.dtype, patches.dtype), torch.float32)
    rows, places = _rows(sentences.to(dtype), mask)
    with torch.autocast(mask.device.type, enabled=False):
        best_patch, textual = _Alignment.apply(rows, patches.to(dtype), places, chunk)
    return (best_patch[places] * mask[..., None]).sum(1) / counts, textual


def _rows(sentences: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D], and [T, S] places in it: those of a text, the first again where it has no more, so no maximum changes.

    They are the sentences alone, or, where these cannot be counted, zeros besides, to which no place points.
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
    """The two kinds of maxima from one product of all sentences with the patches of a few images.

    The gradient of a maximum has one entry: the gradient of the cosines is put together from the places
    of the maxima, and no cosine is kept, or computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, patches: Tensor, places: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Each sentence's best cosine in each image [M, I], and T [T, I], of `rows` [M, D]; `places` [T, S] in them."""
        ctx.chunk, (images, size, _) = chunk, patches.shape
        best_patch, patch = rows.new_empty(len(rows), images), places.new_empty(len(rows), images)
        textual = rows.new_empty(len(places), images)
        sentence = places.new_empty(len(places), images, size, dtype=torch.int16)
        for span in _spans(images, chunk):
            cosines = (rows @ patches[span].flatten(0, 1).t()).unflatten(1, (-1, size))  # [M, c, P]
            best_patch[:, span], patch[:, span] = cosines.max(-1)
            best_sentence, sentence[:, span] = cosines[places].max(1)  # [T, c, P]
            textual[:, span] = best_sentence.mean(-1)
        ctx.save_for_backward(rows, patches, places, patch, sentence)
        return best_patch, textual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, patches, places, patch, sentence = ctx.saved_tensors
        of_best_patch, of_best_sentence = gradients[0], gradients[1] / patches.shape[1]  # [M, I], [T, I]
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for span in _spans(len(patches), ctx.chunk):
            images = patches[span].flatten(0, 1)  # [c P, D]
            best = places.gather(1, sentence[:, span].flatten(1).long()).view_as(sentence[:, span])  # [T, c, P]
            cosines = rows.new_zeros(len(rows), *best.shape[1:])  # their gradient, [M, c, P]
            cosines.scatter_(0, best, of_best_sentence[:, span, None].expand_as(best))
            cosines.scatter_add_(2, patch[:, span, None], of_best_patch[:, span, None])
            of_rows.addmm_(cosines.flatten(1), images)
            of_patches[span] = (cosines.flatten(1).t() @ rows).view_as(patches[span])
        return of_rows, of_patches, None, None


def _spans(count: int, chunk: int) -> list[slice]:
    return [slice(first, first + chunk) for first in range(0, count, chunk)]
