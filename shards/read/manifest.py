"""`manifest.json`: the contents of a folder of shards. It is written last, so its presence means "done"."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.files import atomic_write, read_json
from shards.from_json import from_json
from shards.schema import SCHEMA_VERSION, SPLIT_MOVES, SPLITS, View

MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"  # one line per image that was not stored; it names files of the archive
BUILD = "build"  # the folder of the plan, one record per shard, and the lock
COPY_OR_REPACK = "copy it again, or run the same `mama pack` again, which rewrites it"
MOST_VIEWS = 10_000  # of one study; without a study column, all exams of a patient are one study
SHARD_NAME = re.compile(r"(train|val|test)-\d{6}\.tar")

# `SplitBy.how` -> a sentence.
SPLIT_BY = {
    "official": "The archive's own split decides",
    "column": "A column of the archive's table decides the split",
    "file": "A file of patients decides the split",
    "hash": "A hash of the patient decides the split: about 70 % train, 10 % val, 20 % test",
}

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
    offsets: tuple[int, ...]  # bytes from the start of the tar to the first header of the sample


@dataclass(frozen=True)
class SplitBy:
    """What decided the splits, for how many stored patients; `moved`: key of `schema.SPLIT_MOVES` -> patients."""

    how: str  # official | column | file | hash
    patients: dict[str, int]  # split -> patients
    moved: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        decides = f"{SPLIT_BY.get(self.how, self.how)}."
        return " ".join((decides, *(f"{n} patients {SPLIT_MOVES.get(why, why)}." for why, n in self.moved.items())))


@dataclass(frozen=True)
class Manifest:
    """A finished build. `settings` are those that determine the bytes of the shards, without local paths."""

    source: str
    settings: dict[str, Any]
    versions: dict[str, str]
    deidentification: dict[str, str]  # PS3.16 CID 7050 code -> meaning
    listed: int  # images named by the archive: stored + refused + excluded
    images: int
    images_refused: dict[str, int]  # key of schema.REFUSED_REASONS -> images; refused.jsonl names the files
    images_excluded: dict[str, int]  # key of schema.EXCLUDED_REASONS -> images
    conflicts: dict[str, int]  # key of schema.CONFLICTS -> images
    duplicates: int  # stored images whose SOP instance another study also stores
    studies_dropped: int  # studies without any stored image
    labels: Histograms
    shards: tuple[Shard, ...]
    raw: int | None = None  # stored FOR PROCESSING images; None: written by a release that did not count them
    fallbacks: dict[str, int] = field(default_factory=dict)  # key of schema.FALLBACKS -> images rendered by it
    split_by: SplitBy | None = None  # None: written by a release that knew the hash of the patient only

    @property
    def patients(self) -> dict[str, int]:
        """Split -> number of stored patients."""
        return patients_of(self.shards)

    @property
    def studies(self) -> int:
        """Number of stored studies."""
        return sum(shard.samples for shard in self.shards)

    @property
    def refused_share(self) -> float:
        """Refused / (stored + refused) images; excluded images do not count."""
        refused = sum(self.images_refused.values())
        return refused / max(1, self.images + refused)


@dataclass(frozen=True)
class Pictures:
    """The entries of `Manifest.settings` that `mama check` compares with the images."""

    codec: str = ""
    long_side: int = 0
    bits: int = 0


def patients_of(shards: Iterable[Shard]) -> dict[str, int]:
    """Split -> number of patients, for each of `SPLITS`."""
    shards = list(shards)
    return {split: len({p for shard in shards if shard.split == split for p in shard.patients}) for split in SPLITS}


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json`, whose presence marks the folder as finished."""
    document = {"schema": SCHEMA_VERSION, **asdict(manifest)}
    atomic_write(folder / MANIFEST, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`. Raises `ShardError` if it is missing, damaged, or of another schema version."""
    path = Path(folder) / MANIFEST
    try:
        document = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{folder}: no {MANIFEST}, so this is not a finished folder of shards; run `mama pack`"
        ) from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}); make it readable") from None
    except ValueError as error:
        raise ShardError(f"{path}: cannot be read ({error}); {COPY_OR_REPACK}") from None
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
        raise ShardError(f"{path}: was edited or damaged ({error}); {COPY_OR_REPACK}") from None
    return manifest


def check_shard_entry(shard: Shard) -> None:
    """Raise `ValueError` for a name that could lead out of the folder, and for a study of too many views."""
    if not SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"{shard.name!r:.80} is not the name of a shard")
    if max(shard.view_counts, default=0) > MOST_VIEWS:
        raise ValueError(f"{shard.name}: a study of {max(shard.view_counts)} views, at most {MOST_VIEWS} are read")


def label_histograms(views: Iterable[tuple[str, View]]) -> Histograms:
    """Histograms of (split, view): BI-RADS, density, cancer, pathology, laterality with view, and vendor."""
    return add_histograms({split: {name: {_text(value): 1} for name, value in _facts(view)}} for split, view in views)


def _facts(view: View) -> Iterator[tuple[str, Any]]:
    yield from asdict(view.labels).items()
    yield "view", f"{view.laterality}-{view.view}"
    yield "vendor", view.vendor


def _text(value: Any) -> str:
    return "unknown" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def add_histograms(histograms: Iterable[Histograms]) -> Histograms:
    """The sum of histograms, with splits in the order of `SPLITS` and sorted facts and values."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for histogram in histograms:
        for split, facts in histogram.items():
            for name, values in facts.items():
                counts.setdefault(split, {}).setdefault(name, Counter()).update(values)
    return {
        split: {name: dict(sorted(values.items())) for name, values in sorted(counts[split].items())}
        for split in SPLITS
        if split in counts
    }
