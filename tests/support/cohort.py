"""Shards of a few invented patients whose facts can be read off their pixels, and a model that reads them off.

The grey of the breast is its density (50 x class + 40), a white square in it is a cancer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mama.data.batches import Texts
from mama.data.tokenizer import Tokenizer
from shards.pack.sample import Sample
from shards.schema import DENSITIES, Finding, Labels, Study, View
from tests.support.shard_folder import write_folder

SIZE = (64, 48)  # (height, width), stored
PATCH = 8
BOX = (16.0, 24.0, 24.0, 32.0)  # exactly the patch in row 3, column 2 of the stored image


def image(density: str, cancer: bool) -> np.ndarray:
    pixels = np.zeros(SIZE, np.uint8)
    pixels[:, :40] = 40 + 50 * DENSITIES.index(density)
    if cancer:
        x0, y0, x1, y1 = map(int, BOX)
        pixels[y0:y1, x0:x1] = 255
    return pixels


def study(number: int, split: str, words: str | None = None) -> Study:
    """Patient `number`: density by number, cancer in the left breast of every second."""
    views = []
    for n, side in enumerate("LR"):
        cancer = side == "L" and number % 2 == 1
        birads = 5 if cancer else 1 + number % 3 // 2
        finding = Finding(1, "mass", BOX, "irregular", "spiculated", "high", pathology="malignant")
        views.append(
            View(
                member=f"{n}.jpg",
                laterality=side,
                view="CC",
                size=SIZE,
                original_size=SIZE,
                pixel_spacing=None,
                crop=(0, 0, SIZE[1], SIZE[0]),
                flipped=False,
                to_original=(1, 0, 0, 0, 1, 0),
                labels=Labels(birads, DENSITIES[number // 2 % 4], cancer, "malignant" if cancer else "normal"),
                findings=(finding,) if cancer and not words else (),
                report=words if cancer else None,
            )
        )
    return Study(f"{split}{number:03d}", f"patient{split}{number}", "invented", split, tuple(views), age=50)


def write_shards(
    folder: Path, patients: dict[str, int], words: str | None = None, known: tuple[str, ...] | None = None
) -> list[Study]:
    """`patients` by split; returns the studies. Of `known` labels alone, where they are given, and without findings."""
    samples = {
        split: [sample(study(number, split, words), known) for number in range(count)]
        for split, count in patients.items()
    }
    write_folder(folder, samples, per_shard=16)
    return [one.study for of_split in samples.values() for one in of_split]


def only(one: Study, known: tuple[str, ...]) -> Study:
    """The same study with no findings and only these of its labels."""
    views = [
        replace(v, labels=Labels(**{name: getattr(v.labels, name) for name in known}), findings=()) for v in one.views
    ]
    return replace(one, views=tuple(views))


def sample(one: Study, known: tuple[str, ...] | None) -> Sample:
    pixels = [image(str(v.labels.density), bool(v.labels.cancer)) for v in one.views]
    jpegs = [cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes() for p in pixels]
    return Sample(one if known is None else only(one, known), tuple(jpegs), ())


class Oracle(nn.Module):
    """Stands in for `MamaModel`: reads the facts off the pixels, or if `blind` off nothing.

    D is 5: the density as one hot, and +1 or -1 for cancer.
    """

    def __init__(self, tokenizer: Tokenizer, blind: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.blind, self.reads_alone = tokenizer, blind, False
        self.vision = SimpleNamespace(backbone=SimpleNamespace(config=SimpleNamespace(patch_size=PATCH)))

    def scale(self) -> Tensor:
        return torch.tensor(10.0)

    def embed_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.blind:
            vectors = torch.ones(len(images), 5) / 5**0.5
            return vectors, torch.randn(len(images), 5, generator=torch.Generator().manual_seed(0))
        pixels = (images[:, 0] + 1) * 127.5
        vectors = torch.stack([_vector(int(p[2, 2].item() - 15) // 50, bool((p > 230).any())) for p in pixels])
        return vectors, vectors

    def embed_texts(self, texts: Texts) -> Tensor:
        return torch.stack([self._read(row[mask]) for row, mask in zip(texts.tokens, texts.mask, strict=True)])

    def patch_embeddings(self, images: Tensor) -> Tensor:
        """The grey of the patches, [b, P, 1]."""
        return nn.functional.avg_pool2d(images, PATCH).flatten(1)[..., None]

    def sentence_embeddings(self, texts: Texts) -> Tensor:
        """Of a sentence about a mass 1, of all others -1, [u, S, 1]: so it sees the grey, or its opposite."""
        rows = []
        for tokens, ends in zip(texts.tokens, texts.separators, strict=True):
            starts = [0, *ends[:-1].tolist()]
            said = [self._words(tokens[a:b]) for a, b in zip(starts, ends.tolist(), strict=True)]
            rows.append(torch.tensor([1.0 if "mass" in words.replace("no mass", "") else -1.0 for words in said]))
        return (0.0 if self.blind else 1.0) * torch.stack(rows)[:, :, None]

    def _words(self, tokens: Tensor) -> str:
        return str(self.tokenizer.base.decode(tokens.tolist()))

    def _read(self, tokens: Tensor) -> Tensor:
        words = self._words(tokens)
        density = next((n for n, d in enumerate(DENSITIES) if f"density {d}" in words), 0)
        return _vector(density, "BI-RADS 4" in words or "BI-RADS 5" in words)


def _vector(density: int, cancer: bool) -> Tensor:
    vector = torch.zeros(5)
    vector[density] = 1.0
    vector[4] = 1.0 if cancer else -1.0
    return vector / vector.norm()
