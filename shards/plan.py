"""Which study goes into which shard: decided before the first image is read, and kept beside the shards.

A build is the work that the plan names and no record tells done. So a build that was killed continues, one
that is cut over many machines is the same as one that is not, and studies that come later only add shards.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.files import read_json
from shards.from_json import from_json
from shards.identity import keyed_hash, split_of
from shards.manifest import write_aside
from shards.sample import study_key
from shards.schema import SCHEMA_VERSION, SPLITS, ShardError, SourceStudy

PLAN = "plan.json"


@dataclass(frozen=True)
class PlannedShard:
    """`studies` are (key, digest) in the order of the tar; the digest changes with a study's files and labels."""

    name: str
    split: str
    studies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    settings: dict[str, Any]
    versions: dict[str, str]
    shards: tuple[PlannedShard, ...]

    @property
    def digests(self) -> dict[str, str]:
        return {key: digest for shard in self.shards for key, digest in shard.studies}


def listed(studies: Iterable[SourceStudy], source: str, key: bytes) -> dict[str, SourceStudy]:
    """The studies by their key. Raises `ShardError` where a source yields one twice."""
    found: dict[str, SourceStudy] = {}
    for study in studies:
        name = study_key(key, source, study)
        if name in found:
            raise ShardError(f"{source}: yields a study twice (key {name}); its study_id must be unique")
        found[name] = study
    return found


def digest_of(study: SourceStudy, root: Path, key: bytes) -> str:
    """A keyed hash of everything that the source tells of a study, wherever the archive lies."""
    return keyed_hash(key, "digest", repr(study).replace(str(root), ""))


def extend(plan: Plan, studies: Mapping[str, SourceStudy], digests: Mapping[str, str], per_shard: int) -> Plan:
    """The plan with new shards for the studies that it does not know yet, in the order of the source."""
    known = plan.digests
    new: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, study in studies.items():
        if name not in known:
            split = split_of(plan.settings["source"], study.patient_id)
            new[split].append((name, digests[name]))
    shards = list(plan.shards)
    for split in SPLITS:
        first = sum(shard.split == split for shard in plan.shards)
        for number, start in enumerate(range(0, len(new[split]), per_shard), first):
            chunk = tuple(new[split][start : start + per_shard])
            shards.append(PlannedShard(f"{split}-{number:06d}.tar", split, chunk))
    return Plan(plan.settings, plan.versions, tuple(shards))


def save_plan(plan: Plan, folder: Path) -> None:
    document = {"schema": SCHEMA_VERSION, **asdict(plan)}
    write_aside(folder / PLAN, json.dumps(document, sort_keys=True).encode() + b"\n")


def load_plan(folder: Path) -> Plan | None:
    """The plan in `folder`, or None where there is none. Raises `ShardError` where it cannot be used."""
    path = folder / PLAN
    try:
        document = read_json(path)
        version = document.pop("schema", None) if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ShardError(f"{path}: was made by another release; give another `out` and pack again")
        return from_json(Plan, document)
    except FileNotFoundError:
        return None
    except ShardError:
        raise
    except ValueError as error:
        raise ShardError(f"{path}: cannot be read ({error}); give another `out` and pack again") from None
