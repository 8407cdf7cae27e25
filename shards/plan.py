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

from shards.identity import keyed_hash, split_of
from shards.manifest import write_aside
from shards.sample import study_key
from shards.schema import SCHEMA_VERSION, SPLITS, ShardError, SourceStudy
from shards.typed import require_types

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
    """The plan in `folder`, or None where there is none."""
    try:
        document = json.loads((folder / PLAN).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{folder / PLAN}: cannot be read ({error}); give another `out` and pack again") from None
    try:
        if document.pop("schema") != SCHEMA_VERSION:
            raise ShardError(f"{folder / PLAN}: was made by another release; give another `out` and pack again")
        shards = tuple(
            PlannedShard(shard["name"], shard["split"], tuple((key, digest) for key, digest in shard["studies"]))
            for shard in document.pop("shards")
        )
        plan = Plan(**document, shards=shards)
        require_types(plan)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{folder / PLAN}: was edited or damaged ({error}); give another `out` and pack again"
        raise ShardError(message) from None
    return plan
