"""Embed the images of a split, and on request their report texts, for validation and evaluation.

Letters: n images, D shared width, d width of the image tower, L = `data.max_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mama.data.augment import normalise
from mama.data.held_out import CollateRows, Split
from mama.data.loader import load, to_device
from mama.data.tokenizer import Tokenizer
from mama.model.mama_model import MamaModel
from mama.settings.schema import Config
from shards.progress import progress


class Embedded(NamedTuple):
    """Embeddings of n images and their report texts, on the CPU."""

    images: Tensor  # fp32 [n, D], unit
    tower: Tensor  # fp32 [n, d], global feature of the image tower
    readable: Tensor  # bool [n]; where false the other rows are meaningless
    texts: Tensor = torch.empty(0)  # fp32 [n, D], unit; empty without a tokenizer, like `tokens`
    tokens: Tensor = torch.empty(0)  # int64 [n, L], padded


def embed_split(
    model: MamaModel,
    split: Split,
    config: Config,
    device: torch.device,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    title: str | None = None,
) -> Embedded:
    """Embed the images `indices` of `split`, or all, in this order; with a `tokenizer` the split's texts too.

    The caller sets evaluation mode and turns gradients off. `title` heads a progress display. Draws no random number
    from PyTorch's global generator. Raises as `load` does.
    """
    collate = CollateRows(tokenizer, config.data.max_tokens)
    count = -(-len(split if indices is None else indices) // batch_size)
    dtype = next(model.parameters()).dtype
    parts = []
    # A loader without a generator of its own would draw from training's.
    options = {"sampler": indices, "batch_size": batch_size, "generator": torch.Generator()}
    with closing(load(split, config, collate, device, **options)) as batches:
        for pixels, readable, texts in progress(batches, count, title, "batches") if title else batches:
            unit, tower = model.embed_images(normalise(to_device(pixels, device)).to(dtype))
            part = [unit.float(), tower.float(), readable]
            if tokenizer is not None:
                padding = config.data.max_tokens - texts.tokens.shape[1]
                part.append(model.embed_texts(texts.to(device)).float())
                part.append(F.pad(texts.tokens, (0, padding), value=tokenizer.pad_id))
            parts.append([tensor.cpu() for tensor in part])
    return Embedded(*(torch.cat(column) for column in zip(*parts, strict=True)))
