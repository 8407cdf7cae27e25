"""Start, continue or extend a build: list the archive, and bring the plan in `out` up to date with it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from shards.errors import ShardError
from shards.pack.archive_changes import is_whole, renew, report_changes, survey
from shards.pack.build_settings import as_begun, compare_settings, folders, settings_of, source_options
from shards.pack.early_checks import limit_ahead, refuse_own_files
from shards.pack.identity import load_key
from shards.pack.picture_settings import jpeg_quality, picture_config
from shards.pack.plan import PLAN, Plan, PlannedShard, extend, listed, load_plan, save_plan
from shards.pack.sample import SampleConfig
from shards.pack.settings import BEFORE, PackConfig
from shards.pack.shard_record import load_record, records_of, remove_record
from shards.pack.splits import check_unmoved, find_splits
from shards.progress import waiting
from shards.read.manifest import BUILD, MANIFEST, Manifest, load_manifest
from shards.schema import SourceStudy
from shards.sources.all_sources import SOURCES

log = logging.getLogger(__name__)

DECODERS = (
    *("numpy", "opencv-python-headless", "pillow", "pydicom"),
    *("pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm"),
)


@dataclass(frozen=True)
class Build:
    """A plan with the studies that it refers to by key."""

    config: PackConfig
    sample: SampleConfig
    out: Path
    plan: Plan
    studies: Mapping[str, SourceStudy]

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.out / BUILD

    @property
    def pending(self) -> list[PlannedShard]:
        """The planned shards that are not written, or whose tar is missing or truncated."""
        return [shard for shard in self.plan.shards if not is_whole(self.out, load_record(self.records, shard.name))]

    @property
    def has_images(self) -> bool:
        """Whether any written shard holds an image."""
        records = (load_record(self.records, shard.name) for shard in self.plan.shards)
        return any(record and record.images for record in records)


def open_build(config: PackConfig, planned: bool = False) -> Build:
    """List the archive, and start, continue or extend the plan in `out`; with `planned` the plan stays as it is.

    Raises `ShardError` for a mistake in the configuration, and for settings or an archive that do not fit the plan.
    """
    root, out = folders(config)
    options = source_options(config)
    key = load_key(Path(os.path.expanduser(config.key_file)))
    plan = load_plan(out / BUILD)
    config = as_begun(config, plan.settings) if plan else config
    settings = settings_of(config, options, key)
    if plan is None and ((out / MANIFEST).exists() or any(out.glob("*.tar"))):
        raise ShardError(f"pack.out: {out} holds shards without their {BUILD}/{PLAN}; give another `out`")
    earlier = {**BEFORE, **plan.settings} if plan else settings
    settings["implants"] = earlier["implants"]
    because = compare_settings(settings, earlier, out, planned)
    with waiting(f"pack {config.source}, reading tables and looking for files"):
        studies: Mapping[str, SourceStudy] = listed(SOURCES[config.source](root, **options), config.source, key)
    studies = studies if settings["implants"] else _without_implants(studies)
    refuse_own_files(studies, root, out)
    splits = find_splits(config, root, options, studies, key)
    settings["split"] = splits.how
    compare_settings({"split": splits.how}, earlier, out, planned)
    studies = splits.given_to(studies)
    plan = plan or Plan(settings, {name: version(name) for name in DECODERS}, ())
    if planned:
        check_unmoved(plan, records_of(plan, out / BUILD), studies, out)
    else:
        # A plan of an earlier release, without these settings, keeps lacking them: its manifest stays the same.
        kept = {name: value for name, value in settings.items() if name not in BEFORE or name in plan.settings}
        plan = _renewed(config, replace(plan, settings=kept, moved=splits.moved), studies, key, because)
        save_plan(plan, out / BUILD)
    picture, quality = picture_config(config), jpeg_quality(config)
    sample = SampleConfig(config.source, root, key, picture, quality, config.intent, settings["implants"])
    return Build(config, sample, out, plan, studies)


def _without_implants(studies: Mapping[str, SourceStudy]) -> Mapping[str, SourceStudy]:
    """The studies as an earlier release listed them, so that they count as unchanged."""
    return {
        name: replace(study, views=tuple(replace(view, implant=None) for view in study.views))
        for name, study in studies.items()
    }


def _renewed(config: PackConfig, plan: Plan, studies: Mapping[str, SourceStudy], key: bytes, because: str) -> Plan:
    """The plan for the archive as it is now."""
    root, out = folders(config)
    records = records_of(plan, out / BUILD)
    if not any(record.images for record in records.values()):
        for name in records:  # only empty tars: nothing is stored yet, so plan afresh
            remove_record(out / BUILD, name)
            (out / name).unlink(missing_ok=True)
        plan, records = replace(plan, shards=()), {}
    check_unmoved(plan, records, studies, out)
    archive = survey(studies, root, key, f"pack {config.source}, sizes of files")
    known = plan.keys
    plan, changes = renew(plan, records, archive)
    report_changes(changes, records, out, because)
    if left := len(known - plan.keys - studies.keys()):
        log.warning("%d planned studies without stored images are no longer in the archive: left out", left)
    plan = extend(plan, studies, archive.entries, config.samples_per_shard)
    if not plan.shards:
        raise ShardError(f"{config.root}: holds no study")
    pending = [shard for shard in plan.shards if not is_whole(out, records.get(shard.name))]
    written = [record for name, record in records.items() if name not in {shard.name for shard in pending}]
    limit_ahead(config, root, archive, pending, written)
    _withdraw_manifest(out, {shard.name for shard in pending if shard.name not in records})
    return plan


def _withdraw_manifest(out: Path, repacked: set[str]) -> None:
    """Remove a manifest that lists shards which are about to be packed again with other content."""
    manifest = earlier_manifest(out) if repacked else None
    if manifest and any(shard.name in repacked for shard in manifest.shards):
        (out / MANIFEST).unlink()


def earlier_manifest(out: Path) -> Manifest | None:
    """The manifest in `out`; None if it is missing, or damaged, as it will be rewritten from the records."""
    try:
        return load_manifest(out) if (out / MANIFEST).exists() else None
    except ShardError as error:
        log.warning("%s; it is written again", error)
        return None
