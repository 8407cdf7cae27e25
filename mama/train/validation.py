"""Validation during training: retrieval among held-out images, with the same figures on any number of ranks.

With `heads.norm=published` each rank embeds its share of the images with its own running statistics.
Letters: n images, D shared width, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mama.data.held_out import Split
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model.embed import embed_split
from mama.model.mama_model import MamaModel
from mama.objective.losses import info_nce
from mama.runtime import collectives
from mama.settings.schema import Config
from shards.errors import ShardError

LARGEST = 2000  # images: among all of a large archive, validation would take longer than the steps between
DEPTHS = (1, 5, 10)


def validation_images(config: Config) -> Split:
    """At most `LARGEST` images of the split `val`, the same in every run, up to `data.max_corrupt` of them unreadable.

    Raises `ConfigError` if the shards have no such split.
    """
    try:
        return Split(config, "val", LARGEST, config.data.max_corrupt, with_texts=True)
    except ConfigError as error:
        every = config.train.validate_every
        raise ConfigError(f"train.validate_every: {every}, but {error}; pack some, or set it to 0") from error


@torch.no_grad()  # not inference mode: parameters that ZeRO-3 gathers in it could not take part in a gradient later
def validate(model: MamaModel, config: Config, tokenizer: Tokenizer, device: torch.device) -> dict[str, float]:
    """Recall and loss of `model` on `validation_images`; all ranks call it between two steps and get the same values.

    `validation/recall_at_{1,5,10}_i2t`: share of the images whose own text is among the best 1, 5 or 10 of all
    different texts; `..._t2i`: share of the different texts with an image of their own among the best of all images.
    `validation/clip_loss`: symmetric InfoNCE over all n images, with equal texts as each other's positives whatever
    `loss.positives` is. Unreadable images are left out. The model returns to the mode that it was in; no random
    number is drawn from PyTorch's global generator.

    Raises `ConfigError` if the shards have no split `val`, `ShardError` if more images than `data.max_corrupt`, or
    all, are unreadable.
    """
    held_out = validation_images(config)
    training = model.training
    model.eval()
    try:
        images, texts, tokens = _embed(model, held_out, config, tokenizer, device)
        scale = model.scale()
    finally:
        model.train(training)
    _, own = torch.unique(tokens, dim=0, return_inverse=True)  # [n], equal texts have equal numbers
    same = own[:, None] == own[None, :]  # [n, n]
    scores = images @ texts.t()  # [n, n]
    first = (same.int().argmax(1) == torch.arange(len(own), device=device)).nonzero()[:, 0]  # one row of each text
    figures = {"validation/clip_loss": float(info_nce(scale * scores, same.float()))}
    for depth in DEPTHS:
        figures[f"validation/recall_at_{depth}_i2t"] = recall(scores[:, first], same[:, first], depth)
        figures[f"validation/recall_at_{depth}_t2i"] = recall(scores[:, first].t(), same[:, first].t(), depth)
    return figures


def recall(scores: Tensor, right: Tensor, depth: int) -> float:
    """Share of q queries with a right answer among the best `depth` of c; `scores` and bool `right` are [q, c].

    Ties count against the model: one that embeds everything alike has recall 0.
    """
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    ahead = ((scores >= best) & ~right).sum(1)
    return float((ahead < depth).float().mean())


def _embed(
    model: MamaModel, held_out: Split, config: Config, tokenizer: Tokenizer, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of all readable images and of their texts, [n, D] each, and tokens [n, L]; on every rank.

    Rank r embeds the images r, r + ranks, ...; a rank with too few embeds some twice, as under ZeRO-3 the ranks must
    run equally many forward passes.
    """
    ranks, count = collectives.world_size(), len(held_out)
    share = [(collectives.rank() + k * ranks) % count for k in range(-(-count // ranks))]
    batch_size = 2 * config.train.micro_batch  # as many images as a training step holds, there with their gradients
    embedded = embed_split(model, held_out, config, device, batch_size, indices=share, tokenizer=tokenizer)
    readable = in_order(embedded.readable, count, device)
    if not readable.any():
        raise ShardError("data.shards: no image of the split 'val' can be read; run `mama check`")
    parts = (embedded.images, embedded.texts, embedded.tokens)
    images, texts, tokens = (in_order(part, count, device)[readable] for part in parts)
    return images, texts, tokens


def in_order(part: Tensor, count: int, device: torch.device) -> Tensor:
    """This rank's rows -> the first `count` rows of all ranks, in the order of the images, on `device`."""
    rows = collectives.gather(part.to(device))
    return rows.unflatten(0, (collectives.world_size(), -1)).transpose(0, 1).flatten(0, 1)[:count]
