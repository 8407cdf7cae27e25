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
from mama.settings.schema import Config
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


# uint8 [1, H, W], its report text (no sentences unless the split is read `with_texts`; nothing is masked), and whether
# it is readable: if not, the first are zeros and a sentence that stands in.
Row = tuple[Tensor, list[str], bool]


class Split(Dataset[Row]):
    """The images of one split in manifest order: `split[i]` has pixels and text, `items[i]` the facts.

    Of more than `most` images, a random sample that depends on the manifests alone: runs of any seed are compared on
    the same images. Up to `max_unreadable` studies may be unreadable; without it the first one raises `ShardError`.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        most: int | None = None,
        max_unreadable: int | None = None,
        with_texts: bool = False,
    ) -> None:
        self.name, self.data, self.with_texts = name, config.data, with_texts
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
            text = self._text(number, position) if self.with_texts else []
            return torch.from_numpy(self.images.pixels(number, position, self.size))[None], text, True
        except FetchError:
            raise
        except ShardError as error:
            if self.unreadable is None:
                raise
            self.unreadable.add(self.images.key(number), error)
            return torch.zeros(1, *self.size, dtype=torch.uint8), ["unreadable"], False

    def _text(self, number: int, position: int) -> list[str]:
        study = self.images.study(number)
        return report_text.text(study, study.views[position], self.style, tell_pathology=self.data.tell_pathology)

    def pixels(self, item: Item, larger: int = 1) -> NDArray[np.uint8]:
        """uint8 [larger * H, larger * W], scaled to the canvas as in training."""
        return self.images.pixels(item.number, item.position, (larger * self.size[0], larger * self.size[1]))

    def stored(self, item: Item) -> NDArray[np.uint8]:
        """uint8 [h, w] at its stored size."""
        return self.images.stored(item.number, item.position)


class CollateRows:
    """Rows of a `Split` -> a batch; a class so that loader workers can receive it."""

    def __init__(self, tokenizer: Tokenizer | None, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, rows: list[Row]) -> tuple[Tensor, Tensor, Texts | None]:
        """uint8 [b, 1, H, W], readable bool [b]; with a tokenizer the b report texts."""
        pixels, texts, readable = zip(*rows, strict=True)
        tokens = None if self.tokenizer is None else tokenise(self.tokenizer, list(texts), self.max_tokens)
        return torch.stack(pixels), torch.tensor(readable), tokens
