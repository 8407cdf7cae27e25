"""`manifest.json`: what a finished folder of shards holds. It is written last, so it also says "done"."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.files import atomic_write, read_json
from shards.from_json import from_json
from shards.schema import SCHEMA_VERSION, SPLITS, ShardError, View

MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"  # a line for each image that is left out; it names files of the archive
BUILD = "build"  # the folder with the plan, a record for each shard, and the lock
AGAIN = "copy it again, or run the same `mama pack` again, which writes it anew"
MOST_VIEWS = 10_000  # of one study; without a column that tells exams apart a patient is one study
SHARD_NAME = re.compile(r"(train|val|test)-\d{6}\.tar")

# split -> fact -> value -> number of images
Histograms = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Shard:
    """One tar file. The tuples hold one entry per sample, in the order of the tar."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    patients: tuple[str, ...]
    view_counts: tuple[int, ...]
    offsets: tuple[int, ...]  # bytes from the start of the tar to the sample's first header


@dataclass(frozen=True)
class Manifest:
    """`settings` are those that decide the bytes of the shards; local paths are not among them."""

    source: str
    settings: dict[str, Any]
    versions: dict[str, str]
    deidentification: dict[str, str]  # PS3.16 CID 7050 code -> meaning
    listed: int  # images that the archive names: stored, refused and excluded ones
    images: int
    images_refused: dict[str, int]  # reason code -> number; the files are named in refused.jsonl
    images_excluded: dict[str, int]  # the same for images that are something else than was asked for
    conflicts: dict[str, int]  # word of schema.CONFLICTS -> images
    duplicates: int  # stored images whose SOP instance is stored in another study already
    studies_dropped: int  # studies of which no image was left
    labels: Histograms
    shards: tuple[Shard, ...]
    raw: int | None = None  # stored images that are FOR PROCESSING; None in a manifest from before they were counted
    fallbacks: dict[str, int] = field(default_factory=dict)  # word of schema.FALLBACKS -> images rendered by it

    @property
    def studies(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def refused_share(self) -> float:
        refused = sum(self.images_refused.values())
        return refused / max(1, self.images + refused)


@dataclass(frozen=True)
class Pictures:
    """Those of `Manifest.settings` that `mama check` compares with the pictures."""

    codec: str = ""
    long_side: int = 0
    bits: int = 0


def save_manifest(manifest: Manifest, folder: Path) -> None:
    document = {"schema": SCHEMA_VERSION, **asdict(manifest)}
    atomic_write(folder / MANIFEST, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def load_manifest(folder: Path) -> Manifest:
    """Raises `ShardError` where `folder` is not a finished folder of shards of this release's schema."""
    path = Path(folder) / MANIFEST
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ShardError(f"{folder}: no {MANIFEST}, so this is no finished folder of shards; run `mama pack`") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise ShardError(f"{path}: cannot be read ({error}); {AGAIN}") from None
    version = document.pop("schema", None) if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ShardError(
            f"{path}: schema {version!r:.20}, this release reads {SCHEMA_VERSION}; pack the archive into another `out`"
        )
    try:
        manifest = from_json(Manifest, document)
        from_json(
            Pictures, {f.name: manifest.settings[f.name] for f in fields(Pictures) if f.name in manifest.settings}
        )
        for shard in manifest.shards:
            check_shard_entry(shard)
    except ValueError as error:
        raise ShardError(f"{path}: was edited or damaged ({error}); {AGAIN}") from None
    return manifest


def check_shard_entry(shard: Shard) -> None:
    """Raises `ValueError` for a name that would lead out of the folder, and for studies of endless views."""
    if not SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"{shard.name!r:.80} is no name of a shard")
    if max(shard.view_counts, default=0) > MOST_VIEWS:
        raise ValueError(f"{shard.name}: a study of {max(shard.view_counts)} views, at most {MOST_VIEWS} are read")


def label_histograms(views: Iterable[tuple[str, View]]) -> Histograms:
    """Counts over images of (split, view): BI-RADS, density, cancer, pathology, side with view, and vendor."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for split, view in views:
        facts = {**asdict(view.labels), "view": f"{view.laterality}-{view.view}", "vendor": view.vendor}
        for name, value in facts.items():
            text = "unknown" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            counts.setdefault(split, {}).setdefault(name, Counter())[text] += 1
    return _sorted(counts)


def add_histograms(histograms: Iterable[Histograms]) -> Histograms:
    counts: dict[str, dict[str, Counter[str]]] = {}
    for histogram in histograms:
        for split, facts in histogram.items():
            for name, values in facts.items():
                counts.setdefault(split, {}).setdefault(name, Counter()).update(values)
    return _sorted(counts)


def _sorted(counts: dict[str, dict[str, Counter[str]]]) -> Histograms:
    return {
        split: {name: dict(sorted(values.items())) for name, values in sorted(counts[split].items())}
        for split in SPLITS
        if split in counts
    }
