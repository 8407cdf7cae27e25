"""A finished folder of shards out of ready-made samples, for tests that need no archive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.pack.plan import Plan
from shards.pack.sample import Sample
from shards.pack.shard_record import Tally, manifest_of
from shards.pack.writer import write_shard
from shards.read.manifest import save_manifest


def write_folder(folder: Path, samples: Mapping[str, Sequence[Sample]], per_shard: int) -> None:
    """Write the samples of each split as `pack` would, `per_shard` to a tar."""
    folder.mkdir(parents=True)
    records = []
    for split, all_samples in samples.items():
        for number, start in enumerate(range(0, len(all_samples), per_shard)):
            tally = Tally()
            chunk = tally.kept(all_samples[start : start + per_shard])
            records.append(tally.record(write_shard(folder, f"{split}-{number:06d}.tar", split, chunk)))
    save_manifest(manifest_of(Plan({"source": "invented", "split": "hash"}, {}, ()), records), folder)
