"""The images of one split as validation and evaluation see them: unaugmented, in manifest order, with their facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mama.data import report_text
from mama.data.batches import Texts, tokenise
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.data.unreadable import UnreadableSamples
from mama.settings.schema import Config, DataConfig
from shards.errors import FetchError, ShardError
from shards.schema import Study, View


@dataclass(frozen=True)
class Item:
    """One image of a split: its place in `Images`, and the facts of its study."""

    number: int  # of the study
    position: int  # of the view in the study
    study: Study

    @property
    def view(self) -> View:
        """The facts of the image."""
        return self.study.views[self.position]

    @property
    def key(self) -> str:
        """<study key>/<member>"""
        return f"{self.study.key}/{self.view.member}"


Row = tuple[Tensor, Item | None]  # uint8 [1, H, W] and its facts; zeros and None if the image is unreadable


class Split(Dataset[Row]):
    """The images of one split in manifest order: `split[i]` has pixels and facts, `items[i]` the facts alone.

    Of more than `most` images, a random sample that depends on the manifests alone: runs of any seed are compared on
    the same images. Up to `max_unreadable` studies may be unreadable; without it the first one raises `ShardError`.
    """

    def __init__(self, config: Config, name: str, most: int | None = None, max_unreadable: int | None = None) -> None:
        self.name = name
        self.size, self.style = config.data.image_size, config.data.style
        self.images = Images(config.data, name)
        count = len(self.images)
        self.chosen = list(range(count))
        if most is not None:
            self.chosen = np.sort(np.random.default_rng(0).permutation(count)[:most]).tolist()
        self.unreadable = None if max_unreadable is None else UnreadableSamples(max_unreadable)

    @cached_property
    def items(self) -> list[Item]:
        """The facts of all images, read once. Raises `ShardError` if those of a study cannot be read."""
        places = [self.images.locate(image) for image in self.chosen]
        studies = {number: self.images.study(number) for number in sorted({number for number, _ in places})}
        return [Item(number, position, studies[number]) for number, position in places]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        """Raises `ShardError` for more unreadable studies than are allowed, `FetchError` for a failing network."""
        number, position = self.images.locate(self.chosen[index])
        try:
            item = Item(number, position, self.images.study(number))
            return torch.from_numpy(self.pixels(item))[None], item
        except FetchError:
            raise
        except ShardError as error:
            if self.unreadable is None:
                raise
            self.unreadable.add(self.images.key(number), error)
            return torch.zeros(1, *self.size, dtype=torch.uint8), None

    def pixels(self, item: Item, larger: int = 1) -> NDArray[np.uint8]:
        """uint8 [larger * H, larger * W], scaled to the canvas as in training."""
        return self.images.pixels(item.number, item.position, (larger * self.size[0], larger * self.size[1]))

    def stored(self, item: Item) -> NDArray[np.uint8]:
        """uint8 [h, w] at its stored size."""
        return self.images.stored(item.number, item.position)


class CollateRows:
    """Rows of a `Split` -> a batch; a class so that loader workers can receive it."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None) -> None:
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor, Texts | None]:
        """uint8 [b, 1, H, W], readable bool [b]; with a tokenizer the b report texts, nothing masked."""
        pixels, items = zip(*rows, strict=True)
        readable = torch.tensor([item is not None for item in items])
        if self.tokenizer is None:
            return torch.stack(pixels), readable, None
        texts = tokenise(self.tokenizer, [self._text(item) for item in items], self.config.max_tokens)
        return torch.stack(pixels), readable, texts

    def _text(self, item: Item | None) -> list[str]:
        if item is None:
            return ["unreadable"]
        return report_text.text(item.study, item.view, self.config.style, tell_pathology=self.config.tell_pathology)
