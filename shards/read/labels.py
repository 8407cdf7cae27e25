"""The labels of all images of a folder of shards, without its pictures: one pass over the studies' facts."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

from shards.files import read_json
from shards.read.cache import cached
from shards.read.manifest import Shard
from shards.read.reader import ShardReader
from shards.schema import Labels, ShardError


def labels_of(reader: ShardReader, cache: Path) -> list[Labels]:
    """The labels of every image of `reader`, in its order; as `facts_of`."""
    return [labels for labels, _ in facts_of(reader, cache)]


def facts_of(reader: ShardReader, cache: Path) -> list[tuple[Labels, str | None]]:
    """The labels of every image of `reader` and the reason of its exam, in its order.

    The first start reads the facts of every study, two small reads and some 0.2 ms of one core each; they are kept
    in `cache` by the SHA-256 of the tar, and later starts read one file a shard. Raises `ShardError` where facts
    cannot be read: what depends on them would otherwise depend on who could read them.
    """
    found: list[tuple[Labels, str | None]] = []
    first = 0
    for shard in reader.shards:
        numbers = range(first, first + shard.samples)
        found += _facts(reader, shard, numbers, cache)
        first = numbers.stop
    return found


def _facts(reader: ShardReader, shard: Shard, numbers: range, cache: Path) -> list[tuple[Labels, str | None]]:
    def write(file: BinaryIO) -> None:
        studies = (reader.study(i) for i in numbers)
        values = [[*astuple(view.labels), study.reason] for study in studies for view in study.views]
        file.write(json.dumps(values).encode())

    path = cached(cache / "labels", shard.sha256, ".facts.json", write)
    try:
        facts = [(Labels(*values), reason) for *values, reason in read_json(path)]
    except (OSError, TypeError, ValueError):
        facts = []
    if len(facts) != sum(shard.view_counts):
        raise ShardError(f"{path}: was edited or damaged; delete it, it is made anew")
    return facts
