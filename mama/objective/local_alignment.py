"""Symmetric local alignment (SLA): similarity of texts and images by their best-matching sentences and patches.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119; see docs/METHOD.md, "Objective". With C[s, p] the cosine of sentence s
and patch p,

    V[i, j] = mean over s in text i of max over p in image j of C[s, p]      visual score
    T[i, j] = mean over p in image j of max over s in text i of C[s, p]      textual score

With a temperature, which the source does not have, the maximum over patches in V is a mean with weights w:

    V[i, j] = mean over s in text i of sum over p in image j of w[s, p] C[s, p]
    w[s, :] = softmax over p in image j of C[s, p] / temperature

Letters: T texts, S sentences of the longest text, M rows (the sentences of all texts), I images, P patches of the image
with most of them, N patches of all images, D width, c images of a chunk, n patches of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mama.model.heads import countable


def alignment_scores(
    sentences: Tensor,
    mask: Tensor,
    patches: Tensor,
    chunk: int,
    patch_mask: Tensor | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """V and T, [T, I] each, of unit vectors `sentences` [T, S, D] and `patches` [I, P, D].

    `mask` [T, S] is true at sentences; `sentences` is not read elsewhere. `patch_mask` [I, P] is true at patches, None
    if it would be everywhere; `patches` may be any finite numbers elsewhere. `temperature`, above 0, pools patches by a
    softmax; None: by the maximum. Memory: a few times the cosines of all sentences with `chunk` images at a time, and
    two bytes per text and patch for the backward pass; on a CPU nothing for the padding of patches. Computed and
    returned in at least fp32, also under autocast: a logit scale of 100 would amplify bf16 rounding. A text without a
    sentence raises `ValueError` on a CPU, like an image without a patch; on a GPU, where checking would force a
    synchronisation, its visual score is NaN, and the scores of the image are not finite.
    """
    if chunk < 1:
        raise ValueError(f"chunk: {chunk} is less than 1 image")
    counts = mask.sum(1, keepdim=True)
    dtype = torch.promote_types(torch.promote_types(sentences.dtype, patches.dtype), torch.float32)
    rows, row_numbers = _rows(sentences.to(dtype), mask)
    with torch.autocast(mask.device.type, enabled=False):
        if patch_mask is not None and countable(patch_mask):
            own = patch_mask.sum(1).tolist()
            if not all(own):
                raise ValueError(f"patch_mask: image {own.index(0)} has no patch")
            packed = patches[patch_mask].to(dtype)
            pooled, textual = _PackedAlignment.apply(rows, packed, row_numbers, own, chunk, temperature)
        else:
            pooled, textual = _Alignment.apply(rows, patches.to(dtype), row_numbers, chunk, patch_mask, temperature)
    return (pooled[row_numbers] * mask[..., None]).sum(1) / counts, textual


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
    """Both scores from one matrix product of all sentences with the patches of a few images.

    The gradient of a maximum has one entry, so that of its cosines is rebuilt from the positions of the maxima: no
    cosine is kept or recomputed. That of a softmax has all: the cosines are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        patches: Tensor,
        row_numbers: Tensor,
        chunk: int,
        patch_mask: Tensor | None,
        temperature: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The pooled cosines of each row [M, D] with each image [M, I], and T [T, I]; `row_numbers` is [T, S]."""
        ctx.chunk, ctx.temperature, (images, size, _) = chunk, temperature, patches.shape
        pooled, patch = _results(rows, row_numbers, images, temperature)
        textual = rows.new_empty(len(row_numbers), images)
        sentence = row_numbers.new_empty(len(row_numbers), images, size, dtype=torch.int16)
        for span in _spans(images, chunk):
            cosines = (rows @ patches[span].flatten(0, 1).t()).unflatten(1, (-1, size))  # [M, c, P]
            best_sentence, sentence[:, span] = cosines[row_numbers].max(1)  # [T, c, P]
            if patch_mask is None:
                textual[:, span] = best_sentence.mean(-1)
                seen = None
            else:
                seen = patch_mask[span]
                best_sentence.masked_fill_(~seen, 0)
                textual[:, span] = best_sentence.sum(-1) / seen.sum(1)
            if temperature is None:
                pooled[:, span], patch[:, span] = _masked(cosines, seen).max(-1)
            else:
                pooled[:, span] = _weights(cosines, temperature, seen).mul_(cosines).sum(-1)
        ctx.save_for_backward(rows, patches, row_numbers, pooled, patch, sentence, patch_mask)
        return pooled, textual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Gradients of `rows` [M, D] and `patches` [I, P, D]."""
        rows, patches, row_numbers, pooled, patch, sentence, patch_mask = ctx.saved_tensors
        sizes = patches.shape[1] if patch_mask is None else patch_mask.sum(1)
        of_pooled, of_best_sentence = gradients[0], gradients[1] / sizes  # [M, I], [T, I]
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for span in _spans(len(patches), ctx.chunk):
            images = patches[span].flatten(0, 1)  # [c P, D]
            best = row_numbers.gather(1, sentence[:, span].flatten(1).long()).view_as(sentence[:, span])  # [T, c, P]
            own = of_best_sentence[:, span, None].expand_as(best)
            seen = None if patch_mask is None else patch_mask[span]
            if seen is not None:
                own = own * seen
            cosines = rows.new_zeros(len(rows), *best.shape[1:])  # their gradient, [M, c, P]
            cosines.scatter_(0, best, own)
            if ctx.temperature is None:
                cosines.scatter_add_(2, patch[:, span, None], of_pooled[:, span, None])
            else:
                again = (rows @ images.t()).view_as(cosines)
                cosines += _of_softly_pooled(of_pooled[:, span], again, pooled[:, span], ctx.temperature, seen)
            of_rows.addmm_(cosines.flatten(1), images)
            of_patches[span] = (cosines.flatten(1).t() @ rows).view_as(patches[span])
        return of_rows, of_patches, None, None, None, None


class _PackedAlignment(torch.autograd.Function):
    """`_Alignment` of images that differ in their patches, [N, D] one image behind the other; `counts` are on the host.

    What is kept of an image is the place of a patch in its own image.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        patches: Tensor,
        row_numbers: Tensor,
        counts: list[int],
        chunk: int,
        temperature: float | None,
    ) -> tuple[Tensor, Tensor]:
        """The pooled cosines of each row [M, D] with each image [M, I], and T [T, I]; `row_numbers` is [T, S]."""
        ctx.counts, ctx.chunk, ctx.temperature = counts, chunk, temperature
        pooled, patch = _results(rows, row_numbers, len(counts), temperature)
        textual = rows.new_empty(len(row_numbers), len(counts))
        sentence = row_numbers.new_empty(len(row_numbers), len(patches), dtype=torch.int16)
        for images, span in _packed_spans(counts, chunk):
            cosines = rows @ patches[span].t()  # [M, n]
            best_sentence, sentence[:, span] = cosines[row_numbers].max(1)  # [T, n]
            own = cosines.split(counts[images], 1), best_sentence.split(counts[images], 1)
            for image, (of_image, best) in enumerate(zip(*own, strict=True), images.start):
                textual[:, image] = best.mean(1)
                if temperature is None:
                    pooled[:, image], patch[:, image] = of_image.max(1)
                else:
                    pooled[:, image] = _weights(of_image, temperature).mul_(of_image).sum(1)
        ctx.save_for_backward(rows, patches, row_numbers, pooled, patch, sentence)
        return pooled, textual

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Gradients of `rows` [M, D] and `patches` [N, D]."""
        rows, patches, row_numbers, pooled, patch, sentence = ctx.saved_tensors
        sizes = torch.tensor(ctx.counts)
        starts = sizes.cumsum(0) - sizes  # [I], the first patch of each image
        of_pooled, of_best_sentence = gradients[0], gradients[1] / sizes  # [M, I], [T, I]
        of_rows, of_patches = torch.zeros_like(rows), torch.empty_like(patches)
        for images, span in _packed_spans(ctx.counts, ctx.chunk):
            best = row_numbers.gather(1, sentence[:, span].long())  # [T, n]
            cosines = rows.new_zeros(len(rows), best.shape[1])  # their gradient, [M, n]
            cosines.scatter_(0, best, of_best_sentence[:, images].repeat_interleave(sizes[images], 1))
            if ctx.temperature is None:
                cosines.scatter_add_(1, patch[:, images] + starts[images] - span.start, of_pooled[:, images])
            else:
                own = (part.split(ctx.counts[images], 1) for part in (cosines, rows @ patches[span].t()))
                for image, (of_image, again) in enumerate(zip(*own, strict=True), images.start):
                    of_image += _of_softly_pooled(of_pooled[:, image], again, pooled[:, image], ctx.temperature)
            of_rows.addmm_(cosines, patches[span])
            of_patches[span] = cosines.t() @ rows
        return of_rows, of_patches, None, None, None, None


def _results(rows: Tensor, row_numbers: Tensor, images: int, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Room for what is kept of each row [M, D] in each image, [M, I]: a pooled cosine; the place of a maximum."""
    places = images if temperature is None else 0
    return rows.new_empty(len(rows), images), row_numbers.new_empty(len(rows), places)


def _masked(cosines: Tensor, seen: Tensor | None) -> Tensor:
    """`cosines` [..., P], changed in place to -inf where `seen` is false, so that no pooling sees them there."""
    return cosines if seen is None else cosines.masked_fill_(~seen, -torch.inf)


def _weights(cosines: Tensor, temperature: float, seen: Tensor | None = None) -> Tensor:
    """The softmax over patches of cosines [..., P], 0 where `seen` is false."""
    return _masked(cosines / temperature, seen).softmax(-1)


def _of_softly_pooled(
    of_pooled: Tensor, cosines: Tensor, pooled: Tensor, temperature: float, seen: Tensor | None = None
) -> Tensor:
    """The gradient of cosines [..., P] from that of what a softmax pools them to, [...]."""
    slope = (cosines - pooled[..., None]).div_(temperature).add_(1)
    return _weights(cosines, temperature, seen).mul_(slope).mul_(of_pooled[..., None])


def _spans(count: int, chunk: int) -> list[slice]:
    return [slice(first, first + chunk) for first in range(0, count, chunk)]


def _packed_spans(counts: list[int], chunk: int) -> Iterator[tuple[slice, slice]]:
    """The images of each chunk, and their patches in a row, of which each image has so many."""
    first = 0
    for start in range(0, len(counts), chunk):
        own = slice(start, start + chunk)
        past = first + sum(counts[own])
        yield own, slice(first, past)
        first = past
