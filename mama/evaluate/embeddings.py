"""Images of a split, shared over the ranks, and texts -> embeddings in float32.

Letters: n images, t texts, D shared width, d width of the image tower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mama.data.batches import tokenise
from mama.data.held_out import Split
from mama.data.loader import require_shared_memory
from mama.data.tokenizer import Tokenizer
from mama.evaluate.arrays import Float32s
from mama.model.embed import embed_split
from mama.model.mama_model import MamaModel
from mama.runtime.sharing import over_ranks
from mama.settings.schema import Config


@dataclass(frozen=True)
class Features:
    """The outputs of a model for the images of a split."""

    embeddings: Float32s  # [n, D], unit
    tower: Float32s  # [n, d], global feature of the image tower, before the projection: input of the linear probe


@torch.inference_mode()
def embed_images(model: MamaModel, split: Split, config: Config, device: torch.device, label: str) -> Features:
    """Embed every image of `split` in its order; on ranks other than the first only this rank's share.

    Every rank must call it. Raises `ConfigError` for too little shared memory, else as `load`.
    """
    size = config.eval.batch
    require_shared_memory(config, size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def embed(batches: list[range]) -> Iterator[tuple[Tensor, Tensor]]:
        own = [row for rows in batches for row in rows]
        title = f"{label}: {split.name} images"
        embedded = embed_split(model, split, config, device, size, indices=own, title=title)
        return zip(embedded.images.split(size), embedded.tower.split(size), strict=True)

    images, tower = zip(*over_ranks(len(split), size, embed), strict=True)
    return Features(torch.cat(images).numpy(), torch.cat(tower).numpy())


def embed_texts(
    model: MamaModel, tokenizer: Tokenizer, texts: list[list[str]], config: Config, device: torch.device
) -> Float32s:
    """Unit embeddings [t, D] of texts given as lists of sentences, shared over the ranks.

    Every rank must call it, and only rank 0 gets all rows.
    """
    embed = partial(_text_batches, model, tokenizer, texts, config, device)
    return np.concatenate(over_ranks(len(texts), config.eval.batch, embed))


@torch.inference_mode()
def _text_batches(
    model: MamaModel,
    tokenizer: Tokenizer,
    texts: list[list[str]],
    config: Config,
    device: torch.device,
    batches: list[range],
) -> Iterator[Float32s]:
    for rows in batches:
        batch = tokenise(tokenizer, texts[rows.start : rows.stop], config.data.max_tokens)
        yield model.embed_texts(batch.to(device)).float().cpu().numpy()
