"""Shards -> `Batch`: studies become pairs of views with the text of their facts."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mama import augment, order, prompt
from mama.config import Config, ConfigError, DataConfig
from mama.tokens import Tokenizer
from shards.read import ShardReader
from shards.schema import Study


@dataclass
class Texts:
    """Tokenised texts, each once: u distinct texts, L tokens, S sentences at most.

    `separators` are the positions of the tokens at which sentence embeddings are read.
    """

    tokens: Tensor  # int64 [u, L]
    mask: Tensor  # bool [u, L], true where a token is
    separators: Tensor  # int64 [u, S]
    sentence_mask: Tensor  # bool [u, S], true where a sentence is

    def to(self, device: torch.device) -> Texts:
        return Texts(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class Batch:
    """One micro-batch of b training pairs (anchor v, partner w) and their texts."""

    keys: list[str]  # "<study key>/<member>" of the anchors
    anchors: Tensor  # uint8 [b, 1, H, W]
    partners: Tensor  # uint8 [b, 1, H, W]
    anchor_changes: Tensor  # float32 [b, 9], see mama.augment
    partner_changes: Tensor
    texts: Texts
    anchor_text: Tensor  # int64 [b], row of `texts` that speaks of the anchor
    partner_text: Tensor  # int64 [b], of the partner: the same row unless it is the other breast
    text_ids: Tensor  # int64 [b], hash of the anchor's text: equal texts, equal ids
    partner_text_ids: Tensor  # int64 [b], of the partner's

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value if isinstance(value, list) else value.to(device) for name, value in moved.items()}
        return Batch(**moved)


@dataclass
class Pair:
    """One training sample before collation."""

    key: str
    anchor: np.ndarray
    partner: np.ndarray
    anchor_change: np.ndarray
    partner_change: np.ndarray
    anchor_text: list[str]
    partner_text: list[str]


class Images:
    """Every image of a split of several shard folders, numbered 0 .. len - 1 in manifest order."""

    def __init__(self, folders: list[str], split: str) -> None:
        if not folders:
            raise ConfigError("data.shards: empty; name at least one folder written by `mama pack`")
        self.readers = [ShardReader(Path(folder), split) for folder in folders]
        studies = [(reader, i) for reader in self.readers for i in range(len(reader))]
        counts = [count for reader in self.readers for count in reader.view_counts]
        self.studies = studies
        self.ends = list(accumulate(counts))
        if not self.ends:
            raise ConfigError(f"data.shards: {', '.join(folders)} hold no image of the split {split!r}")

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, image: int) -> tuple[int, int]:
        """Number of the study and of the view within it."""
        study = bisect_right(self.ends, image)
        return study, image - (self.ends[study - 1] if study else 0)

    def study(self, number: int) -> Study:
        reader, i = self.studies[number]
        return reader.study(i)

    def pixels(self, number: int, view: int, size: tuple[int, int]) -> np.ndarray:
        """uint8 [H, W] of one view, fitted to `size`."""
        return fit(self.stored(number, view), size)

    def stored(self, number: int, view: int) -> np.ndarray:
        """uint8 [h, w] of one view; of shards with 16 bits the upper eight, rounded."""
        reader, i = self.studies[number]
        image = reader.image(i, view)
        return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 [h, w] to fit in (H, W) with its aspect kept; air fills the right and both ends.

    The chest wall stays at the left edge, where packing puts it.
    """
    scale, top, _ = fit_geometry((image.shape[0], image.shape[1]), size)
    height, width = (max(1, round(side * scale)) for side in image.shape)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.zeros(size, dtype=np.uint8)
    canvas[top : top + height, :width] = cv2.resize(image, (width, height), interpolation=interpolation)
    return canvas


def fit_geometry(stored: tuple[int, int], size: tuple[int, int]) -> tuple[float, int, int]:
    """Scale, top and left offset that `fit` uses: canvas x = scale * stored x + left, likewise y."""
    scale = min(size[0] / stored[0], size[1] / stored[1])
    return scale, (size[0] - max(1, round(stored[0] * scale))) // 2, 0


def partner_of(study: Study, anchor: int, config: DataConfig, rng: np.random.Generator) -> int:
    """The partner view: another image that the pair policy allows, else the anchor itself."""
    here = study.views[anchor]
    others = [n for n in range(len(study.views)) if n != anchor]
    if config.pair == "breast":
        others = [n for n in others if study.views[n].laterality == here.laterality]
    elif config.pair == "contralateral":
        others = [n for n in others if study.views[n].laterality != here.laterality]
    elif config.pair == "augment":
        others = []
    if not others or rng.random() >= config.partner_probability:
        return anchor
    return others[rng.integers(len(others))]


class Pairs(Dataset[Pair]):
    """Training pairs by global sample index: `pairs[g]` depends on (manifest, seed, g) alone."""

    def __init__(self, config: Config, split: str = "train") -> None:
        self.config, self.seed = config.data, config.seed
        self.images = Images(config.data.shards, split)

    def __getitem__(self, index: int) -> Pair:
        rng = order.generator_at(index, self.seed)
        number, anchor = self.images.locate(order.image_at(index, len(self.images), self.seed))
        study = self.images.study(number)
        partner = partner_of(study, anchor, self.config, rng)
        hidden = prompt.draw_hidden(rng, self.config.mask_probability)
        v, w = study.views[anchor], study.views[partner]
        anchor_text = prompt.report(study, v, hidden)
        other_side = v.laterality != w.laterality
        size = self.config.image_size
        return Pair(
            key=f"{study.key}/{v.member}",
            anchor=self.images.pixels(number, anchor, size),
            partner=self.images.pixels(number, partner, size),
            anchor_change=augment.draw(self.config.augment, size, rng),
            partner_change=augment.draw(self.config.augment, size, rng),
            anchor_text=anchor_text,
            partner_text=prompt.report(study, w, hidden) if other_side else anchor_text,
        )


class Collate:
    """Pairs -> `Batch`; a class so that loader workers can receive it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, pairs: list[Pair]) -> Batch:
        rows: dict[tuple[str, ...], int] = {}
        anchor_text = [rows.setdefault(tuple(p.anchor_text), len(rows)) for p in pairs]
        partner_text = [rows.setdefault(tuple(p.partner_text), len(rows)) for p in pairs]
        return Batch(
            keys=[p.key for p in pairs],
            anchors=torch.from_numpy(np.stack([p.anchor for p in pairs])[:, None]),
            partners=torch.from_numpy(np.stack([p.partner for p in pairs])[:, None]),
            anchor_changes=torch.from_numpy(np.stack([p.anchor_change for p in pairs])),
            partner_changes=torch.from_numpy(np.stack([p.partner_change for p in pairs])),
            texts=tokenise(self.tokenizer, [list(text) for text in rows], self.max_tokens),
            anchor_text=torch.tensor(anchor_text),
            partner_text=torch.tensor(partner_text),
            text_ids=torch.tensor([_text_id(p.anchor_text) for p in pairs]),
            partner_text_ids=torch.tensor([_text_id(p.partner_text) for p in pairs]),
        )


def tokenise(tokenizer: Tokenizer, texts: list[list[str]], max_tokens: int) -> Texts:
    """Sentence lists -> `Texts`, padded to the longest of this call only."""
    encoded = [tokenizer.encode(sentences, max_tokens) for sentences in texts]
    length = max(len(e.tokens) for e in encoded)
    sentences = max(len(e.separators) for e in encoded)
    tokens = torch.full((len(encoded), length), tokenizer.pad_id)
    mask = torch.zeros(len(encoded), length, dtype=torch.bool)
    separators = torch.zeros(len(encoded), sentences, dtype=torch.long)
    sentence_mask = torch.zeros(len(encoded), sentences, dtype=torch.bool)
    for row, e in enumerate(encoded):
        tokens[row, : len(e.tokens)] = torch.tensor(e.tokens)
        mask[row, : len(e.tokens)] = True
        separators[row, : len(e.separators)] = torch.tensor(e.separators)
        sentence_mask[row, : len(e.separators)] = True
    return Texts(tokens, mask, separators, sentence_mask)


def _text_id(sentences: list[str]) -> int:
    """A 63-bit hash, the same in every process and on every rank."""
    digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class _MicroBatches:
    """The loader's batch sampler; it makes the indices as they are asked for, not all of a run at once."""

    config: Config
    steps: range
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        sizes = self.config.train.global_batch, self.config.train.micro_batch
        return order.micro_batches(self.steps, *sizes, self.rank, self.world_size)

    def __len__(self) -> int:
        return len(self.steps) * self.config.train.accumulation(self.world_size)


def training_batches(config: Config, tokenizer: Tokenizer, steps: range, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's micro-batches for `steps`, in order; `accumulation` of them make one step."""
    loader = DataLoader(
        Pairs(config),
        batch_sampler=_MicroBatches(config, steps, rank, world_size),
        collate_fn=Collate(tokenizer, config.data.max_tokens),
        num_workers=config.data.workers,
    )
    return iter(loader)
