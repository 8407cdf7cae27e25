"""What a prediction draws while images pass by: heat maps as PNG files, and pictures for the pages of exams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mama.evaluate.arrays import Float32s
from mama.export.preprocessing import Canvas
from mama.predict.document import MapFacts
from mama.predict.heat_map import map_png, marks, to_original
from mama.predict.neighbours import Archive
from mama.predict.pictures import Pictured
from mama.predict.results import MAPS
from mama.predict.seen import Seen
from mama.predict.shown import Shown, shown
from shards.files import atomic_write, legible


@dataclass
class Drawing:
    """Draws below `folder`: a `Draw` of `mama.predict.encoder`. With `pages` it keeps what these need of each image.

    Without the local term in training there are no maps.
    """

    canvas: Canvas
    sentences: Sequence[str]
    folder: Path
    pages: bool = False
    archive: Archive | None = None  # of the neighbours on the pages
    shown: dict[str, Shown] = field(default_factory=dict)  # by file
    images: int = 0

    def __call__(self, batch: Sequence[Pictured], embeddings: Float32s, values: Float32s) -> list[dict[str, MapFacts]]:
        """Draw a batch with its unit embeddings [b, D] and maps [b, s, gh, gw]; one without tissue has no map."""
        return [
            self._draw(one, dict(zip(self.sentences, of_image, strict=True)) if len(of_image) else {}, embedding)
            for one, of_image, embedding in zip(batch, values, embeddings, strict=True)
        ]

    def _draw(self, one: Pictured, maps: Mapping[str, Float32s], embedding: Float32s) -> dict[str, MapFacts]:
        self.images += 1
        if not maps and not self.pages:
            return {}
        seen = one.seen()
        if self.pages:
            near = self.archive.nearest(seen, embedding) if self.archive else []
            self.shown[legible(one.file)] = shown(seen, maps, self.canvas.fit, near)
        return {
            sentence: found
            for number, (sentence, values) in enumerate(maps.items(), 1)
            if (found := self._map(seen, values, f"{MAPS}/{self.images:05d}-{number}.png"))
        }

    def _map(self, seen: Seen, values: Float32s, file: str) -> MapFacts | None:
        """Write a map [gh, gw] in the pixels of the original file."""
        found = marks(values, seen, self.canvas.size, self.canvas.fit)
        if found is None:
            return None
        (self.folder / MAPS).mkdir(exist_ok=True)
        drawn = to_original(values, seen, self.canvas.size, self.canvas.fit)
        atomic_write(self.folder / file, map_png(drawn, found.low, found.high))
        return MapFacts(
            file=file,
            low=found.low,
            high=found.high,
            peak=found.peak and list(found.peak),
            box=found.box and list(found.box),
        )
