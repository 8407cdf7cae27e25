"""Local alignment maps: the cosine of the sentence that names a finding with each patch of its image.

Letters: t targets, S sentences, P = gh x gw patches of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mama.data import report_text
from mama.data.augment import normalise
from mama.data.batches import tokenise
from mama.data.held_out import Item, Split
from mama.data.images import BACKGROUND, canvas_geometry
from mama.data.tokenizer import Tokenizer
from mama.evaluate import bootstrap
from mama.evaluate.arrays import Flags, Float32s
from mama.model.mama_model import MamaModel
from mama.runtime.sharing import over_ranks
from mama.settings.schema import Config, Fit
from shards.progress import progress
from shards.schema import Box, View


@dataclass(frozen=True)
class Target:
    """A sentence about a finding in one image, and the boxes of that finding in pixels of the canvas."""

    item: Item
    text: list[str]
    sentence: int
    boxes: tuple[Box, ...]


def find_targets(split: Split, tokenizer: Tokenizer, max_tokens: int) -> list[Target]:
    """Every sentence about a finding, in the split's images that show a lesion.

    Findings of an image in the same words share one sentence with several boxes. Sentences of a radiologist's report
    are not linked to boxes: the first one gets all boxes of the image. Sentences beyond `max_tokens` are left out.
    """
    targets = []
    for item in split.items:
        text = report_text.text(item.study, item.view, split.style, frozenset(report_text.META))
        room = len(tokenizer.encode(text, max_tokens).separators)
        for sentence, boxes in _sentences(
            item.view, report_text.finding_sentences(item.view, split.style, text)
        ).items():
            if text.index(sentence) < room:
                fitted = tuple(fit_box(box, item.view.size, split.size, split.images.fit) for box in boxes)
                targets.append(Target(item, text, text.index(sentence), fitted))
    return targets


def _sentences(view: View, named: list[str]) -> dict[str, list[Box]]:
    """The sentences that name a lesion and the boxes of each; `named` are the sentences of the findings, in order."""
    boxes: dict[str, list[Box]] = {}
    if report_text.own_words(view):
        positive = view.findings or view.labels.cancer or view.labels.pathology in ("benign", "malignant")
        words = named[:1] if positive else []
        return {sentence: [f.box for f in view.findings if f.box] for sentence in words}
    for finding, sentence in zip(view.findings, named, strict=False):
        boxes.setdefault(sentence, []).extend([finding.box] if finding.box else [])
    return boxes


def fit_box(box: Box, stored: tuple[int, int], size: tuple[int, int], how: Fit) -> Box:
    """(x0, y0, x1, y1) in pixels of the stored image (height, width) -> in those of the canvas (H, W)."""
    across, down, top = canvas_geometry(stored, size, how)
    x0, y0, x1, y1 = box
    return across * x0, down * y0 + top, across * x1, down * y1 + top


@torch.inference_mode()
def maps(
    model: MamaModel, tokenizer: Tokenizer, split: Split, targets: list[Target], config: Config, device: torch.device
) -> Float32s:
    """Cosine of each target's sentence with each patch of its image, [t, gh, gw].

    Every rank must call it; on ranks other than the first the maps are those of this rank's share.
    """
    patch = int(model.vision.backbone.config.patch_size)
    grid = (split.size[0] // patch, split.size[1] // patch)

    def cosines(batches: list[range]) -> Iterator[Float32s]:
        for rows in progress(batches, len(batches), "local alignment", "batches"):
            batch = [targets[row] for row in rows]
            pixels = torch.from_numpy(np.stack([split.pixels(t.item) for t in batch])[:, None])
            texts = tokenise(tokenizer, [t.text for t in batch], config.data.max_tokens)
            found = model.alignment(normalise(pixels.to(device)), texts.to(device))  # [b, S, P]
            sentences = torch.tensor([t.sentence for t in batch], device=device)
            own = found[torch.arange(len(batch), device=device), sentences]  # [b, P]
            yield own.float().cpu().numpy().reshape(-1, *grid)

    return np.concatenate([np.zeros((0, *grid), np.float32), *over_ranks(len(targets), config.eval.batch, cosines)])


def brightest(split: Split, targets: list[Target], grid: tuple[int, ...], batch: int) -> Float32s:
    """Mean grey value of each patch, [t, gh, gw]: the baseline that always points at the brightest spot.

    Shared over the ranks as `maps` are.
    """

    def means(batches: list[range]) -> Iterator[Float32s]:
        for rows in batches:
            yield np.stack([_patch_means(split.pixels(targets[row].item), grid) for row in rows])

    return np.concatenate([np.zeros((0, *grid), np.float32), *over_ranks(len(targets), batch, means)])


def region(boxes: tuple[Box, ...], size: tuple[int, int], grid: tuple[int, int]) -> Flags:
    """Flags [gh, gw] of the patches that overlap a box or neighbour such a patch; boxes in pixels of (H, W)."""
    inside = np.zeros(grid, dtype=bool)
    tall, wide = size[0] / grid[0], size[1] / grid[1]
    for x0, y0, x1, y1 in boxes:
        top, bottom = max(0, int(y0 // tall) - 1), int(np.ceil(y1 / tall)) + 1
        left, right = max(0, int(x0 // wide) - 1), int(np.ceil(x1 / wide)) + 1
        inside[top:bottom, left:right] = True
    return inside


def pointing_game(
    scores: dict[str, Float32s], grey: Float32s, targets: list[Target], size: tuple[int, int], config: Config
) -> dict[str, Any]:
    """How often the highest patch of a map lies in the box of its finding or next to it, over targets with boxes.

    `scores` holds the maps [t, gh, gw] of each model, `grey` the mean grey values of the same patches. `chance` is the
    mean share of tissue patches that count as a hit. Source: Zhang et al., "Top-down neural attention by excitation
    backprop", 2018, section 4.2.
    """
    boxed = [i for i, target in enumerate(targets) if target.boxes]
    document: dict[str, Any] = {"findings": len(boxed), "rows": []}
    if not boxed:
        return document | {"patients": 0, "reason": "no finding of this split has a box"}
    patients = [targets[i].item.study.patient for i in boxed]
    grid = (grey.shape[1], grey.shape[2])
    regions = np.stack([region(targets[i].boxes, size, grid) for i in boxed])
    tissue = grey[boxed] > BACKGROUND
    chance = (regions & tissue).sum((1, 2)) / np.maximum(tissue.sum((1, 2)), 1)
    for name, values in scores.items():
        best = values[boxed].reshape(len(boxed), -1).argmax(1)
        hits = regions.reshape(len(boxed), -1)[np.arange(len(boxed)), best].astype(np.float64)
        estimate = bootstrap.mean(hits, patients, config.eval.bootstrap, config.seed)
        document["rows"].append({"model": name, "hit_rate": asdict(estimate)})
    return document | {"patients": len(set(patients)), "chance": float(chance.mean())}


def examples(targets: list[Target], count: int) -> list[int]:
    """Indices of the first `count` targets in shard order that show cancer, one per patient, whatever the result."""
    chosen: dict[str, int] = {}
    for i, target in enumerate(targets):
        labels = target.item.view.labels
        if labels.cancer or labels.pathology == "malignant":
            chosen.setdefault(target.item.study.patient, i)
    return list(chosen.values())[:count]


def _patch_means(pixels: NDArray[np.uint8], grid: tuple[int, ...]) -> Float32s:
    tall, wide = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    cut = pixels[: grid[0] * tall, : grid[1] * wide].astype(np.float32)
    return cut.reshape(grid[0], tall, grid[1], wide).mean((1, 3))
