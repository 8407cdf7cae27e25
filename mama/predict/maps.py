"""The heat maps of a prediction as files: a PNG for each image and sentence, in the pixels of the original file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np

from mama.evaluate.arrays import Float32s
from mama.predict.document import MapFacts
from mama.predict.heat_map import has_maps, heat_maps, map_png, marks, to_original
from mama.predict.model import Model
from mama.predict.pictures import Pictured
from mama.predict.results import MAPS
from mama.predict.seen import Seen
from shards.files import atomic_write


@dataclass
class MapFiles:
    """Writes the maps of `sentences` below `folder`: see `Draw` of `mama.predict.model`."""

    model: Model
    sentences: Sequence[str]
    folder: Path
    numbers: count[int] = field(default_factory=lambda: count(1))  # of the images

    def __call__(self, batch: Sequence[Pictured]) -> list[dict[str, MapFacts]]:
        """Write the maps of a batch; an image without tissue has none."""
        made, config = self.model, self.model.config
        canvases = np.stack([one.canvas for one in batch])
        limits = config.data.max_tokens, made.device, config.data.style
        values = heat_maps(made.model, made.tokenizer, canvases, self.sentences, *limits)  # [b, s, gh, gw]
        return [self._of_image(one.seen(), of_image) for one, of_image in zip(batch, values, strict=True)]

    def _of_image(self, seen: Seen, values: Float32s) -> dict[str, MapFacts]:
        number, found = next(self.numbers), {}
        canvas = self.model.preprocessing.canvas
        for place, (sentence, one) in enumerate(zip(self.sentences, values, strict=True), 1):
            shown = marks(one, seen, canvas.size, canvas.fit)
            if shown is None:
                continue
            file = f"{MAPS}/{number:05d}-{place}.png"
            atomic_write(self.folder / file, map_png(to_original(one, seen, canvas.size, canvas.fit)))
            found[sentence] = MapFacts(
                file=file,
                low=shown.low,
                high=shown.high,
                peak=shown.peak and list(shown.peak),
                box=shown.box and list(shown.box),
            )
        return found


def map_files(model: Model, sentences: Sequence[str], folder: Path) -> MapFiles | None:
    """None if there is nothing to draw: no sentence, or a model without the local term."""
    if not sentences or not has_maps(model.model):
        return None
    (folder / MAPS).mkdir()
    return MapFiles(model, sentences, folder)
