"""The plan assigns every study to a shard, before the first image is read, and is kept beside the shards.

The work of a build is the planned shards without a record. So a killed build continues, one that is distributed over
machines ends in the same bytes as a local one, and studies that arrive later only add shards.
`shards.pack.archive_changes` compares a plan with the archive.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.files import atomic_write, read_json
from shards.from_json import from_json
from shards.pack.identity import keyed_hash, split_of
from shards.pack.sample import study_key
from shards.pack.texts import normalise_texts
from shards.read.manifest import BUILD
from shards.schema import SCHEMA_VERSION, SPLITS, SourceStudy

PLAN = "plan.json"
# Advice of `pack` and `check` for a damaged plan.
RESTORE = f"restore it from a copy, or remove the folder {BUILD}: shards can be read without it, but not extended"


@dataclass(frozen=True)
class Entry:
    """A study in a plan, with the keyed hash of everything the source yields about it (`digest_of`).

    `files` is a keyed hash of the sizes of its files and their newest modification time in seconds; None in plans of
    earlier releases.
    """

    key: str
    digest: str
    files: tuple[str, int] | None = None


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write. `studies` are (key, digest) in the order of the tar; `files` has an entry a study, or none."""

    name: str
    split: str
    studies: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, int], ...] = ()

    @property
    def entries(self) -> list[Entry]:
        """The studies with their files, in the order of the tar."""
        files = self.files or (None,) * len(self.studies)
        return [Entry(*study, of_study) for study, of_study in zip(self.studies, files, strict=True)]

    def with_entries(self, entries: Iterable[Entry]) -> PlannedShard:
        """This shard with other studies."""
        entries = list(entries)
        files = tuple(entry.files for entry in entries if entry.files)
        return replace(self, studies=tuple((entry.key, entry.digest) for entry in entries), files=files)


@dataclass(frozen=True)
class Plan:
    """All shards of a build, with the settings and decoder versions it was started with.

    `moved`: key of `schema.SPLIT_MOVES` -> hashes of the patients, as `shards.pack.splits` decided.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    shards: tuple[PlannedShard, ...]
    moved: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys of all planned studies."""
        return {key for shard in self.shards for key, _ in shard.studies}


def listed(studies: Iterable[SourceStudy], source: str, key: bytes) -> dict[str, SourceStudy]:
    """The studies by their key, with normalised texts. Raises `ShardError` if a source yields a study twice."""
    found: dict[str, SourceStudy] = {}
    for study in map(normalise_texts, studies):
        name = study_key(key, source, study)
        if name in found:
            raise ShardError(f"{source}: yields a study twice (key {name}); its study_id must be unique")
        found[name] = study
    return found


def digest_of(study: SourceStudy, root: Path, key: bytes) -> str:
    """A keyed hash of everything the source yields about a study, independent of the archive's location.

    The words of a refusal are part of it, so an existing message of a source is not reworded: builds that are continued
    would report its studies as changed.
    """
    where = str(root).encode("utf-8", "backslashreplace").decode()  # as `repr` escapes a name that is not UTF-8
    facts = repr(study).replace(", masks=()", "").replace(", implant=None", "")  # earlier releases had neither
    return keyed_hash(key, "digest", facts.replace(where, ""))


def extend(plan: Plan, studies: Mapping[str, SourceStudy], entries: Mapping[str, Entry], per_shard: int) -> Plan:
    """The plan with additional shards for the studies that are not in it, in the order of the source."""
    known = plan.keys
    new: dict[str, list[Entry]] = defaultdict(list)
    for name, study in studies.items():
        if name not in known:
            split = study.split or split_of(plan.settings["source"], study.patient_id)
            new[split].append(entries[name])
    shards = list(plan.shards)
    for split in SPLITS:
        first = sum(shard.split == split for shard in plan.shards)
        for number, start in enumerate(range(0, len(new[split]), per_shard), first):
            shard = PlannedShard(f"{split}-{number:06d}.tar", split, ())
            shards.append(shard.with_entries(new[split][start : start + per_shard]))
    return replace(plan, shards=tuple(shards))


def save_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json`."""
    document = {"schema": SCHEMA_VERSION, **asdict(plan)}
    atomic_write(folder / PLAN, json.dumps(document, sort_keys=True).encode() + b"\n")


def load_plan(folder: Path) -> Plan | None:
    """The plan in `folder`, or None if there is none. Raises `ShardError` if it is damaged or of another schema."""
    path = folder / PLAN
    try:
        document = read_json(path)
        version = document.pop("schema", None) if isinstance(document, dict) else None
        if version is None:
            raise ValueError("schema: is missing")
        if version != SCHEMA_VERSION:
            raise ShardError(f"{path}: was written by another release; give another `out`")
        plan = from_json(Plan, document)
        if any(len(shard.files) not in (0, len(shard.studies)) for shard in plan.shards):
            raise ValueError("files: not one entry a study")
        return plan
    except FileNotFoundError:
        return None
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{path}: was edited or damaged ({error}); {RESTORE}") from None
