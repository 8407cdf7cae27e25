"""Local alignment as it is defined, one text and one image at a time: the reference of the fast implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Sentences of each text: unsorted, with a gap in the middle of the third and one in front of the fourth.
MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
IMAGES, PATCHES, WIDTH = 7, 11, 6
# Patches of each image, where they differ: all, one alone, and with gaps.
PATCH_MASK = torch.arange(PATCHES) < torch.tensor([11, 1, 4, 7, 11, 2, 5])[:, None]
PATCH_MASK[3] = torch.arange(PATCHES) % 3 == 1
PATCH_MASK[5] = torch.arange(PATCHES) == 10


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors; NaN stands where no sentence is, so that reading it would show."""
    generator = torch.Generator().manual_seed(0)
    sentences = F.normalize(torch.randn(*MASK.shape, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    patches = F.normalize(torch.randn(IMAGES, PATCHES, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    sentences[~MASK] = torch.nan
    return sentences.to(dtype).requires_grad_(), patches.to(dtype).requires_grad_()


def loop(
    sentences: Tensor,
    mask: Tensor,
    patches: Tensor,
    patch_mask: Tensor | None = None,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, word for word, one text and one image at a time."""
    visual, textual = [], []
    kept = torch.ones(patches.shape[:2], dtype=torch.bool) if patch_mask is None else patch_mask
    for text, own in zip(sentences, mask, strict=True):
        for image, seen in zip(patches, kept, strict=True):
            cosines = text[own] @ image[seen].t()
            visual.append(torch.stack([_pooled(own_cosines, temperature) for own_cosines in cosines]).mean())
            textual.append(cosines.max(0).values.mean())
    shape = len(sentences), len(patches)
    return torch.stack(visual).view(shape), torch.stack(textual).view(shape)


def _pooled(cosines: Tensor, temperature: float | None) -> Tensor:
    """Of one sentence with the patches of one image: the highest, or the mean weighted by a softmax."""
    if temperature is None:
        return cosines.max()
    powers = [torch.exp(cosine / temperature) for cosine in cosines]
    return sum(power * cosine for power, cosine in zip(powers, cosines, strict=True)) / sum(powers)
