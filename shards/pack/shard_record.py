"""Records: one a shard, written when its tar is complete. The manifest is the sum of the records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from shards.errors import ShardError
from shards.files import atomic_write, read_json
from shards.from_json import from_json
from shards.pack.plan import Plan
from shards.pack.sample import Refusal, Sample
from shards.read.manifest import (
    Histograms,
    Manifest,
    Shard,
    SplitBy,
    add_histograms,
    check_shard_entry,
    label_histograms,
    patients_of,
)
from shards.schema import EXCLUDED, RAW, View

METHODS = {  # codes of DICOM PS3.16 CID 7050 for the profile and option of PS3.15 E.3
    "113100": "Basic Application Confidentiality Profile",
    "113108": "Retain Patient Characteristics Option",
}


@dataclass(frozen=True)
class Record:
    """The result of writing one shard.

    `listed`: images that the archive names for it; `instances`: keyed hashes of the stored SOP instances;
    `refused_studies`: the study key of each refusal, empty in records of earlier releases.
    """

    shard: Shard
    listed: int
    images: int
    studies_dropped: int
    labels: Histograms
    conflicts: dict[str, int]
    refusals: tuple[Refusal, ...]
    instances: tuple[str, ...]
    raw: int | None = None  # stored FOR PROCESSING images; None: a release that did not count them
    fallbacks: dict[str, int] = field(default_factory=dict)
    refused_studies: tuple[str, ...] = ()

    @property
    def has_refused_studies(self) -> bool:
        """Whether each refusal has the key of its study."""
        return len(self.refused_studies) == len(self.refusals)


@dataclass
class Tally:
    """Counts of the samples of one shard, collected while they are written."""

    images: int = 0
    dropped: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    refused_studies: list[str] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    def kept(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Count the samples and pass on those that have images."""
        for sample in samples:
            self.refusals += sample.refusals
            self.refused_studies += [sample.study.key] * len(sample.refusals)
            self.views += sample.study.views
            self.images += len(sample.images)
            if sample.images:
                yield sample
            else:
                self.dropped += 1

    def record(self, shard: Shard) -> Record:
        """The record of the written shard."""
        return Record(
            shard=shard,
            listed=self.images + len(self.refusals),
            images=self.images,
            studies_dropped=self.dropped,
            labels=label_histograms((shard.split, view) for view in self.views),
            conflicts=dict(Counter(fact for view in self.views for fact in view.conflicts)),
            refusals=tuple(self.refusals),
            instances=tuple(view.instance for view in self.views if view.instance),
            raw=sum(view.presentation_intent == RAW for view in self.views),
            fallbacks=dict(Counter(word for view in self.views for word in view.fallbacks)),
            refused_studies=tuple(self.refused_studies),
        )


def save_record(record: Record, folder: Path) -> None:
    """Write the record of a shard, which marks the shard as written."""
    atomic_write(_path(folder, record.shard.name), json.dumps(asdict(record), sort_keys=True).encode() + b"\n")


def remove_record(folder: Path, name: str) -> None:
    """Remove the record of a shard, so that the shard is written again."""
    _path(folder, name).unlink(missing_ok=True)


def load_record(folder: Path, name: str) -> Record | None:
    """The record of a shard, or None if the shard is not written. Raises `ShardError` if the record is damaged."""
    path = _path(folder, name)
    try:
        record = from_json(Record, read_json(path))
        check_shard_entry(record.shard)
        return record
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ShardError(
            f"{path}: was edited or damaged ({error}); remove it and run the same `mama pack` again"
        ) from None


def records_of(plan: Plan, folder: Path) -> dict[str, Record]:
    """The records of the written shards of the plan by name, without studies that the plan has moved since."""
    records = {}
    for shard in plan.shards:
        if record := load_record(folder, shard.name):
            records[shard.name] = _without_moved(record, {key for key, _ in shard.studies})
    return records


def _without_moved(record: Record, planned: set[str]) -> Record:
    """The record without the refusals of studies that have left the shard; none of their images was stored."""
    if not record.has_refused_studies:
        return record
    refused = list(zip(record.refusals, record.refused_studies, strict=True))
    kept = [(refusal, key) for refusal, key in refused if key in planned]
    return replace(
        record,
        listed=record.images + len(kept),
        studies_dropped=len(planned) - len(record.shard.keys),
        refusals=tuple(refusal for refusal, _ in kept),
        refused_studies=tuple(key for _, key in kept),
    )


def manifest_of(plan: Plan, records: Iterable[Record]) -> Manifest:
    """The sum of the records."""
    records = list(records)
    reasons = _sum(Counter(refusal.reason for refusal in record.refusals) for record in records)
    instances = Counter(instance for record in records for instance in record.instances)
    return Manifest(
        source=plan.settings["source"],
        settings=plan.settings,
        versions=plan.versions,
        deidentification=METHODS,
        listed=sum(record.listed for record in records),
        images=sum(record.images for record in records),
        images_refused={reason: n for reason, n in reasons.items() if reason not in EXCLUDED},
        images_excluded={reason: n for reason, n in reasons.items() if reason in EXCLUDED},
        conflicts=_sum(record.conflicts for record in records),
        duplicates=sum(n - 1 for n in instances.values()),
        studies_dropped=sum(record.studies_dropped for record in records),
        labels=add_histograms(record.labels for record in records),
        shards=tuple(record.shard for record in records),
        raw=None if any(record.raw is None for record in records) else sum(record.raw or 0 for record in records),
        fallbacks=_sum(record.fallbacks for record in records),
        split_by=_split_by(plan, [record.shard for record in records]),
    )


def _split_by(plan: Plan, shards: Sequence[Shard]) -> SplitBy | None:
    """None if the plan is of a release that knew the hash only."""
    if "split" not in plan.settings:
        return None
    stored = {patient for shard in shards for patient in shard.patients}
    moved = {why: len(stored.intersection(patients)) for why, patients in plan.moved.items()}
    return SplitBy(plan.settings["split"], patients_of(shards), {why: n for why, n in moved.items() if n})


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, sorted by word."""
    return dict(sorted(sum(map(Counter, counts), Counter[str]()).items()))


def _path(folder: Path, name: str) -> Path:
    return folder / f"{Path(name).stem}.json"
