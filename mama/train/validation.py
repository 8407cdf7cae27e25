"""Retrieval among held-out images during training: recall of images and texts, the same on any number of ranks.

With `heads.norm=published` each rank has running statistics of its own, and embeds its share of the images by them.
Letters: n images, D shared width, L tokens.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mama.data import report_text
from mama.data.augment import normalise
from mama.data.batches import Texts, tokenise
from mama.data.images import Images
from mama.data.loader import load, to_device
from mama.data.tokenizer import Tokenizer
from mama.data.unreadable import Corrupt
from mama.model.mama_model import MamaModel
from mama.objective.losses import info_nce
from mama.runtime import collectives
from mama.settings.schema import Config, ConfigError
from shards.schema import FetchError, ShardError

LARGEST = 2000  # images: recall among all of a large archive would cost more than the steps between
DEPTHS = (1, 5, 10)


Row = tuple[Tensor, list[str], bool]  # uint8 [1, H, W], its sentences, and whether it could be read


class HeldOut(Dataset[Row]):
    """At most `LARGEST` images of the split `val`, unaugmented, with their reports, nothing hidden.

    The choice depends on the manifests alone, so that runs of any seed are compared on the same images.
    Raises `ConfigError` where the shards hold none.
    """

    def __init__(self, config: Config) -> None:
        self.data, self.size = config.data, config.data.image_size
        try:
            self.images = Images(config.data, "val")
        except ConfigError as error:
            every = config.train.validate_every
            raise ConfigError(f"train.validate_every: {every}, but {error}; pack some, or set it to 0") from error
        count = len(self.images)
        self.corrupt = Corrupt(config.data.max_corrupt)
        self.chosen = np.sort(np.random.default_rng(0).permutation(count)[:LARGEST]).tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        """One that cannot be read comes as zeros and says so; raises `ShardError` for more than `data.max_corrupt`."""
        number, position = self.images.locate(self.chosen[index])
        try:
            study = self.images.study(number)
            pixels = self.images.pixels(number, position, self.size)
        except FetchError:
            raise
        except ShardError as error:
            self.corrupt.add(self.images.key(number), error)
            return torch.zeros(1, *self.size, dtype=torch.uint8), ["unreadable"], False
        style, tell = self.data.style, self.data.tell_pathology
        text = report_text.text(study, study.views[position], style, frozenset(), tell)
        return torch.from_numpy(pixels)[None], text, True


class _Collate:
    """A class so that loader workers can receive it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Texts, Tensor]:
        pixels, texts, readable = zip(*rows, strict=True)
        return torch.stack(pixels), tokenise(self.tokenizer, list(texts), self.max_tokens), torch.tensor(readable)


@torch.no_grad()  # not inference mode: what ZeRO-3 gathers in it could take part in no gradient afterwards
def validate(model: MamaModel, config: Config, tokenizer: Tokenizer, device: torch.device) -> dict[str, float]:
    """Recall and loss of `model` on `HeldOut`; every rank calls it between two steps and gets the same values.

    `validation/recall_at_{1,5,10}_{i2t,t2i}` are shares of the images whose own text is among the best 1, 5
    or 10 of all different texts, and of the different texts that have an image of their own among the best
    of all images. `validation/clip_loss` is the symmetric InfoNCE over all n images, with equal texts as
    positives of each other whatever the training counts. The ranks share the images; the model comes back
    in the mode in which it was, and no random number of PyTorch's is drawn.

    Images that cannot be read are left out. Raises `ConfigError` when the shards have no image of the split `val`.
    """
    held_out = HeldOut(config)
    training = model.training
    model.eval()
    try:
        images, texts, tokens = _embed(model, held_out, config, tokenizer, device)
        scale = model.scale()
    finally:
        model.train(training)
    _, own = torch.unique(tokens, dim=0, return_inverse=True)  # [n], equal texts have equal numbers
    same = own[:, None] == own[None, :]  # [n, n]
    scores = images @ texts.t()
    first = (same.int().argmax(1) == torch.arange(len(own), device=device)).nonzero()[:, 0]  # one row of each text
    found = {"validation/clip_loss": float(info_nce(scale * scores, same.float()))}
    for depth in DEPTHS:
        found[f"validation/recall_at_{depth}_i2t"] = recall(scores[:, first], same[:, first], depth)
        found[f"validation/recall_at_{depth}_t2i"] = recall(scores[:, first].t(), same[:, first].t(), depth)
    return found


def recall(scores: Tensor, right: Tensor, depth: int) -> float:
    """Share of the queries with a right answer among the best `depth`; bool `right` is [q, c] as `scores`.

    A tie counts against the model: one that gives the same embedding to everything finds nothing.
    """
    best = scores.masked_fill(~right, float("-inf")).amax(1, keepdim=True)
    ahead = ((scores >= best) & ~right).sum(1)
    return float((ahead < depth).float().mean())


def _embed(
    model: MamaModel, held_out: HeldOut, config: Config, tokenizer: Tokenizer, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of all readable images and of their texts, [n, D] each, and the texts' tokens [n, L].

    They are the same on all ranks.

    Rank r takes the images r, r + ranks, ... and those with too few take some again: under ZeRO-3 the ranks
    must run the same number of forward passes.
    """
    ranks = collectives.world_size()
    share = [(collectives.rank() + k * ranks) % len(held_out) for k in range(-(-len(held_out) // ranks))]
    batches = load(
        held_out,
        config,
        _Collate(tokenizer, config.data.max_tokens),
        device,
        sampler=share,
        batch_size=2 * config.train.micro_batch,  # as many images as training holds, there with their gradients
        generator=torch.Generator(),  # a loader without one would draw from the generator of training
    )
    dtype = model.image_head.weight.dtype
    images, texts, tokens, readable = [], [], [], []
    with closing(batches):
        for pixels, words, good in batches:
            words = words.to(device)
            images.append(model.embed_images(normalise(to_device(pixels, device)).to(dtype))[0].float())
            texts.append(model.embed_texts(words).float())
            missing = config.data.max_tokens - words.tokens.shape[1]
            tokens.append(torch.nn.functional.pad(words.tokens, (0, missing), value=tokenizer.pad_id))
            readable.append(to_device(good, device)[:, None])
    count = len(held_out)
    kept = _in_order(readable, count)[:, 0]
    if not kept.any():
        raise ShardError("data.shards: no image of the split 'val' can be read; run `mama check`")
    return _in_order(images, count)[kept], _in_order(texts, count)[kept], _in_order(tokens, count)[kept]


def _in_order(parts: list[Tensor], count: int) -> Tensor:
    """This rank's rows -> the first `count` rows of all ranks, in the order of the images."""
    rows = collectives.gather(torch.cat(parts))
    by_rank = rows.reshape(collectives.world_size(), -1, rows.shape[1])
    return by_rank.transpose(0, 1).flatten(0, 1)[:count]
