"""What a model makes of the images, texts and findings of an evaluation, computed once and kept on disk.

Letters: n images, t texts, D shared width, d width of the image tower, gh x gw patches of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mama.data.held_out import Split
from mama.data.tokenizer import Tokenizer
from mama.evaluate import linear_probe, localisation
from mama.evaluate.arrays import Float32s, Float64s
from mama.evaluate.controls import Controls
from mama.evaluate.embeddings import embed_images, embed_texts
from mama.evaluate.kept_features import KeptFeatures, state_digest
from mama.evaluate.localisation import Maps, Search
from mama.evaluate.provenance import Document, object_in
from mama.model.mama_model import MamaModel
from mama.run.files import DIGESTS
from mama.runtime import sharing
from mama.settings.schema import Config
from shards.progress import progress

INTENSITIES = "31 intensity percentiles"
NOTHING = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Splits:
    """The images of an evaluation; None for a split that the shards lack, and for the one that is evaluated."""

    held_out: Split
    train: Split | None  # what probes are fitted on
    val: Split | None  # what thresholds are chosen on

    def each(self) -> list[Split]:
        """Those that there are."""
        return [split for split in (self.held_out, self.train, self.val) if split is not None]


@dataclass
class Outputs:
    """Of one model, or of no model; on ranks other than the first empty."""

    tower: dict[str, linear_probe.Features] = field(default_factory=dict)  # by split [n, d], what the probe sees
    images: dict[str, Float32s] = field(default_factory=dict)  # by split [n, D], unit
    texts: Float32s = field(default_factory=lambda: NOTHING)  # [t, D], unit: the distinct texts of the held-out images
    maps: Maps | None = None  # of the lesions that are sought


def splits_of(config: Config, shards: Document) -> Splits:
    """The splits of `config.data.shards` that an evaluation needs; `shards` is what `provenance.shard_set` found.

    Raises `ConfigError` if there is no image of the evaluated split.
    """
    there = {row["split"] for folder in shards["folders"] for row in folder["splits"]} - {config.eval.split}
    train, val = (Split(config, name) if name in there else None for name in ("train", "val"))
    return Splits(Split(config, config.eval.split), train, val)


def identity(name: str, model: MamaModel, folder: Path, weights: str | None) -> Document:
    """What decides about the outputs of a model: its `weights`, or a digest of them, and its tokenizer and settings."""
    digests = object_in(folder / DIGESTS) or {}
    files = {file: digest for file, digest in digests.items() if file == "config.yaml" or file.startswith("tokenizer/")}
    return {"name": name, "weights": weights or state_digest(model), "files": files}


def of_model(
    model: MamaModel,
    tokenizer: Tokenizer,
    splits: Splits,
    texts: list[list[str]],
    sought: Search,
    kept: KeptFeatures,
    known: Document,
) -> Outputs:
    """The outputs of a model whose `identity` is `known`. Every rank must call it."""
    name, config, device, found = known["name"], kept.config, kept.device, Outputs()
    for split in splits.each():

        def embed(split: Split = split) -> dict[str, Any]:
            return vars(embed_images(model, split, config, device, name))

        features = kept.of(f"{name}-images", split, known, embed)
        if features:
            found.images[split.name], found.tower[split.name] = features["embeddings"], features["tower"]
    held_out = splits.held_out

    def embed_all() -> dict[str, Any]:
        return {"texts": embed_texts(model, tokenizer, texts, config, device)}

    said = {"texts": _digest(texts), "max_tokens": config.data.max_tokens}
    found.texts = kept.of(f"{name}-texts", held_out, known, embed_all, **said).get("texts", NOTHING)

    if name != "trained":  # controls ask whether maps have learned to depend on their sentences
        sought = replace(sought, controls=Controls())

    def align() -> dict[str, Any]:
        return vars(localisation.maps(model, tokenizer, held_out, sought, config, device))

    said["texts"] = _digest(_said(sought))
    if aligned := kept.of(f"{name}-maps", held_out, known, align, **said):
        found.maps = Maps(**aligned)
    return found


def intensities(splits: Splits, kept: KeptFeatures) -> Outputs:
    """Percentiles [n, 31] of each image as if they came from a tower. Every rank must call it."""
    found = Outputs()
    for split in splits.each():

        def measure(split: Split = split) -> dict[str, Any]:
            return {"percentiles": _percentiles(split, kept.config.eval.batch)}

        if features := kept.of("intensities", split, None, measure):
            found.tower[split.name] = features["percentiles"]
    return found


def _percentiles(split: Split, size: int) -> Float64s:
    def measure(batches: list[range]) -> Iterator[Float64s]:
        for rows in progress(batches, len(batches), f"intensities: {split.name}", "batches"):
            yield np.stack([linear_probe.intensity_percentiles(split.stored(split.items[row])) for row in rows])

    return np.concatenate(sharing.over_ranks(len(split), size, measure))


def _said(sought: Search) -> list[Any]:
    targets = [(target.row, target.text, target.sentence) for target in sought.targets]
    others = [(control.target, control.text, control.sentence) for control in sought.controls.made]
    any_kind = sought.any_kind and (sought.any_kind.lesions, sought.any_kind.normal)
    asked = [sought.asked.sentences, sought.asked.temperature]
    return [targets, sought.rows, any_kind, others, asked]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
