"""`pack`: an archive of studies -> tar shards, `refused.jsonl` and, written last, `manifest.json`.

`refused.jsonl` and the folder `build` stay with the shards and name files of the archive, which may hold
identifiers: leave them behind when the shards travel. The shards and the manifest hold none.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from shards.files import atomic_write
from shards.image.picture import PictureConfig
from shards.pack.archive_changes import differs, is_whole, renew, report_changes, survey
from shards.pack.build_settings import (
    BEFORE,
    as_begun,
    compare_settings,
    folders,
    settings_of,
    source_options,
    validate,
)
from shards.pack.early_checks import limit_ahead, stop_if_none_is_usable
from shards.pack.identity import load_key
from shards.pack.lock import locked
from shards.pack.plan import PLAN, Plan, PlannedShard, extend, listed, load_plan, save_plan
from shards.pack.sample import Refusal, Sample, SampleConfig
from shards.pack.settings import PackConfig
from shards.pack.shard_record import Record, Tally, load_record, manifest_of, records_of, remove_record, save_record
from shards.pack.workers import in_order
from shards.pack.writer import full_disk_told, write_shard
from shards.progress import progress, waiting
from shards.read.manifest import BUILD, MANIFEST, REFUSED, Manifest, load_manifest, save_manifest
from shards.schema import CONFLICTS, FALLBACKS, ShardError, SourceStudy
from shards.sources.all_sources import SOURCES

log = logging.getLogger(__name__)

LISTED_WORDS = 8  # of views and labels that were not understood
DECODERS = (
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pydicom",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "python-gdcm",
)


@dataclass(frozen=True)
class Build:
    """A plan, and the studies that it is about."""

    config: PackConfig
    sample: SampleConfig
    out: Path
    plan: Plan
    studies: Mapping[str, SourceStudy]

    @property
    def records(self) -> Path:
        return self.out / BUILD

    @property
    def pending(self) -> list[PlannedShard]:
        return [shard for shard in self.plan.shards if not is_whole(self.out, load_record(self.records, shard.name))]

    @property
    def has_images(self) -> bool:
        records = (load_record(self.records, shard.name) for shard in self.plan.shards)
        return any(record and record.images for record in records)


def pack(config: PackConfig) -> Manifest:
    """Build the shards of an archive; in a folder of an earlier build only what is missing there.

    A build that was interrupted continues and ends in the bytes of one that was not; studies that came to
    the archive since add shards, and the shards that are there are not touched. A tar that is gone or cut is written
    again. The bytes depend on archive, settings and key, not on the number of workers. Raises `ShardError` for a
    mistake in the configuration, for a folder that another process is building, where more than `max_refused` of the
    images are not there or refused by the source, and after everything is written if more were refused.
    """
    with locked(_lock(config)), full_disk_told(Path(config.out)):
        build = open_build(config)
        if pending := build.pending:
            _write(build, pending)
        return finish(build)


def pack_part(config: PackConfig, part: int, parts: int) -> None:
    """Write every `parts`-th shard of the plan, from number `part` on: the work of one job of an array.

    `make_plan` comes before it; `pack` comes after it for the manifest, and for what a lost job left. Raises
    `ShardError` where the archive or the settings have changed since the plan was made.
    """
    build = open_build(config, planned=True)
    numbers = range(part, len(build.plan.shards), parts)
    with locked(_lock(config), numbers), full_disk_told(build.out):
        mine = {build.plan.shards[number].name for number in numbers}
        shards = [shard for shard in build.pending if shard.name in mine]
        _compare_shards(build, shards)
        _write(build, shards)


def make_plan(config: PackConfig) -> int:
    """Decide which study goes where; returns the number of shards that are still to be written."""
    with locked(_lock(config)), full_disk_told(Path(config.out)):
        return len(open_build(config).pending)


def open_build(config: PackConfig, planned: bool = False) -> Build:
    """List the archive, and begin, continue or extend the plan in `out`. With `planned` the plan stays as it is."""
    validate(config)
    root, out = folders(config)
    options = source_options(config)
    key = load_key(Path(os.path.expanduser(config.key_file)))
    plan = load_plan(out / BUILD)
    config = as_begun(config, plan.settings) if plan else config
    settings = settings_of(config, options, key)
    if plan is None:
        if (out / MANIFEST).exists() or any(out.glob("*.tar")):
            raise ShardError(f"pack.out: {out} holds shards that it has no {BUILD}/{PLAN} of; give another `out`")
        plan = Plan(settings, {name: version(name) for name in DECODERS}, ())
    because = compare_settings(settings, {**BEFORE, **plan.settings}, out, planned)
    with waiting(f"pack {config.source}, reading tables and looking for files"):
        studies = listed(SOURCES[config.source](root, **options), config.source, key)
    _refuse_own_files(studies, root, out)
    if not planned:
        # A build that was begun without these settings ends without them, and in the same manifest.
        kept = {name: value for name, value in settings.items() if name not in BEFORE or name in plan.settings}
        plan = _renewed(config, replace(plan, settings=kept), studies, key, because)
        save_plan(plan, out / BUILD)
    picture = PictureConfig(
        config.long_side,
        config.bits,
        config.crop,
        config.flip,
        config.reduced_jpeg2000,
        config.tomosynthesis == "slab",
        config.raw == "processed",
    )
    quality = config.quality if config.codec == "jpeg" else None
    sample = SampleConfig(config.source, root, key, picture, quality, config.intent)
    return Build(config, sample, out, plan, studies)


def _renewed(config: PackConfig, plan: Plan, studies: Mapping[str, SourceStudy], key: bytes, because: str) -> Plan:
    """The plan for the archive as it is now."""
    root, out = folders(config)
    records = records_of(plan, out / BUILD)
    if not any(record.images for record in records.values()):
        for name in records:  # empty tars: the plan begins anew, as nothing is stored yet
            remove_record(out / BUILD, name)
            (out / name).unlink(missing_ok=True)
        plan, records = replace(plan, shards=()), {}
    archive = survey(studies, root, key, f"pack {config.source}, sizes of files")
    known = plan.keys
    plan, changes = renew(plan, records, archive)
    report_changes(changes, records, out, because)
    if left := len(known - plan.keys - studies.keys()):
        log.warning("%d planned studies, of which nothing is stored, are gone from the archive: left out", left)
    plan = extend(plan, studies, archive.entries, config.samples_per_shard)
    if not plan.shards:
        raise ShardError(f"{config.root}: holds no study")
    pending = [shard for shard in plan.shards if not is_whole(out, records.get(shard.name))]
    written = [record for name, record in records.items() if name not in {shard.name for shard in pending}]
    limit_ahead(config, root, archive, pending, written)
    _withdraw_manifest(out, {shard.name for shard in pending if shard.name not in records})
    return plan


def _withdraw_manifest(out: Path, anew: set[str]) -> None:
    """Remove a manifest that lists shards which are to be packed anew: it will not be true of them."""
    manifest = _earlier_manifest(out) if anew else None
    if manifest and any(shard.name in anew for shard in manifest.shards):
        (out / MANIFEST).unlink()


def _earlier_manifest(out: Path) -> Manifest | None:
    """None where there is none, or one that is damaged: it is written again from the records."""
    try:
        return load_manifest(out) if (out / MANIFEST).exists() else None
    except ShardError as error:
        log.warning("%s; it is written again", error)
        return None


def finish(build: Build) -> Manifest:
    """Add the records up to `refused.jsonl` and the manifest, where these do not say so already."""
    records = list(records_of(build.plan, build.records).values())
    refusals = [refusal for record in records for refusal in record.refusals]
    lines = "".join(json.dumps(asdict(refusal), ensure_ascii=False) + "\n" for refusal in refusals).encode()
    manifest = manifest_of(build.plan, records)
    refused = build.out / REFUSED
    if _earlier_manifest(build.out) == manifest and refused.exists() and refused.read_bytes() == lines:
        log.info("%s is finished: %d studies, %d images", build.out, manifest.studies, manifest.images)
        _limit_refused(manifest, build)
        return manifest
    atomic_write(refused, lines)
    if not manifest.images:
        causes = Counter(f"{line.reason} ({line.message})" for line in refusals).most_common(1)
        most = "".join(f", {number} of them as {cause}" for cause, number in causes)
        raise ShardError(
            f"pack.root: {build.config.root} holds no usable image: {len(refusals)} are left out{most}, see {refused}; "
            "mend archive or options and run the same `mama pack` again"
        )
    save_manifest(manifest, build.out)
    _log_manifest(build.out, manifest)
    _name_words(refusals)
    _limit_refused(manifest, build)
    return manifest


def _log_manifest(out: Path, manifest: Manifest) -> None:
    left_out = {**manifest.images_excluded, **manifest.images_refused}
    log.info(
        "%s: %d studies; of %d images %d stored, %d left out (%s)",
        out,
        manifest.studies,
        manifest.listed,
        manifest.images,
        sum(left_out.values()),
        ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none",
    )
    if manifest.raw:
        unprocessed = "as they are; pack.raw=processed, in another `out`, renders them"
        how = "rendered" if manifest.settings.get("raw") == "processed" else unprocessed
        log.warning("%d images are raw (FOR PROCESSING), stored %s", manifest.raw, how)
    for word, number in manifest.conflicts.items():
        log.warning("%d images: %s", number, CONFLICTS.get(word, word))
    for word, number in manifest.fallbacks.items():
        log.warning("%d images were rendered by %s", number, FALLBACKS.get(word, word))
    if manifest.duplicates:
        log.warning("%d images are stored in two studies; `mama check %s` names them", manifest.duplicates, out)


def _name_words(refusals: Iterable[Refusal]) -> None:
    """What was not understood in tables and headers: a misspelt view is left out like any other, its word tells it."""
    told = Counter(
        (refusal.reason, refusal.message) for refusal in refusals if refusal.reason in ("other-view", "label")
    )
    for (reason, message), number in told.most_common(LISTED_WORDS):
        log.info("%s, %d images: %s", reason, number, message)
    if len(told) > LISTED_WORDS:
        log.info("%d more of these, see %s", len(told) - LISTED_WORDS, REFUSED)


def _write(build: Build, shards: Sequence[PlannedShard]) -> None:
    studies = [build.studies[key] for shard in shards for key, _ in shard.studies]
    workers = build.config.workers or len(os.sched_getaffinity(0))
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Sample]:
        found = in_order(build.sample, studies, workers)
        if build.config.max_refused < 1 and not build.has_images:
            found = stop_if_none_is_usable(found, build.config.root)
        for sample in found:
            counts.update({"kept": len(sample.images), "left out": len(sample.refusals)})
            yield sample

    def note() -> str:
        return f"{counts['kept']} images kept, {counts['left out']} left out"

    samples = progress(counted(), len(studies), f"pack {build.config.source}", "studies", note)
    for shard in shards:
        lost = load_record(build.records, shard.name)
        record = _write_shard(build.out, shard, samples)
        if lost and lost.shard.sha256 != record.shard.sha256:
            log.warning("%s: is back with other bytes, which another release of mama or a decoder wrote", shard.name)
            (build.out / MANIFEST).unlink(missing_ok=True)
        save_record(record, build.records)
    next(samples, None)  # ends the display and the workers


def _write_shard(out: Path, planned: PlannedShard, samples: Iterator[Sample]) -> Record:
    tally = Tally()
    shard = write_shard(out, planned.name, planned.split, tally.kept(islice(samples, len(planned.studies))))
    return tally.record(shard)


def _lock(config: PackConfig) -> Path:
    validate(config)
    return folders(config)[1] / BUILD / "lock"


def _refuse_own_files(studies: Mapping[str, SourceStudy], root: Path, out: Path) -> None:
    """Raises `ShardError` where the archive holds `out` and the source reads what lies there as a part of it."""
    for real in (os.path.abspath, os.path.realpath):
        inside = os.path.relpath(real(out), real(root))
        if inside.split(os.sep)[0] == os.pardir:
            continue
        prefix = str(root / inside) + os.sep
        for study in studies.values():
            if found := next((view.path for view in study.views if str(view.path).startswith(prefix)), None):
                raise ShardError(
                    f"pack.out: {found} is read as part of the archive; give an `out` that is not inside of {root}"
                )


def _compare_shards(build: Build, shards: Sequence[PlannedShard]) -> None:
    """Raises `ShardError` where studies of these shards are not as the plan has them."""
    planned = [entry for shard in shards for entry in shard.entries]
    wanted = {entry.key: build.studies[entry.key] for entry in planned if entry.key in build.studies}
    now = survey(wanted, build.sample.root, build.sample.key, f"pack {build.config.source}, sizes of files").entries
    changed = sum(entry.key not in now or differs(entry, now[entry.key]) in ("labels", "size") for entry in planned)
    if changed:
        raise ShardError(
            f"pack.root: {changed} studies have changed or gone since {build.out} was planned; run the same "
            "`mama pack` again"
        )


def _limit_refused(manifest: Manifest, build: Build) -> None:
    most = build.config.max_refused
    if manifest.refused_share > most:
        raise ShardError(
            f"pack.max_refused: {manifest.refused_share:.1%} of the images were refused, {most:.1%} are allowed; see "
            f"{build.out / REFUSED}, mend the archive and run the same `mama pack` again, or raise pack.max_refused"
        )
