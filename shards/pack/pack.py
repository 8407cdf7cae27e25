"""`mama pack`: an archive of studies -> tar shards, `refused.jsonl` and, written last, `manifest.json`.

`refused.jsonl` and the folder `build` name files of the archive, which may contain identifiers: leave them behind when
the shards travel. Shards and manifest contain no identifiers.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from shards.errors import ShardError
from shards.files import atomic_write
from shards.pack.archive_changes import differs, survey
from shards.pack.build import Build, earlier_manifest, open_build
from shards.pack.build_settings import folders
from shards.pack.early_checks import stop_if_none_is_usable
from shards.pack.lock import locked
from shards.pack.plan import Plan, PlannedShard
from shards.pack.sample import Refusal, Sample, refusal_lines
from shards.pack.settings import PackConfig
from shards.pack.shard_record import Tally, load_record, manifest_of, records_of, save_record
from shards.pack.workers import in_order
from shards.pack.writer import named_write_errors, write_shard
from shards.progress import progress
from shards.read.manifest import BUILD, MANIFEST, REFUSED, Manifest, SplitBy, save_manifest
from shards.schema import CONFLICTS, FALLBACKS

log = logging.getLogger(__name__)

MOST_MESSAGES = 8  # about views and labels that were not understood


def pack(config: PackConfig) -> Manifest:
    """Build the shards of an archive, or complete an earlier build in the same folder.

    An interrupted build continues and ends in the same bytes as an uninterrupted one. Studies added to the archive
    since go into new shards; existing shards stay, except that a missing or truncated tar is written again. The bytes
    depend on archive, settings and key, not on the number of workers. Raises `ShardError` for a mistake in the
    configuration, for a folder that another process is building, and if more than `max_refused` of the images are
    refused: before the first image is read if table and missing files suffice for that, else when all is written.
    """
    with locked(_lock(config)), named_write_errors(Path(config.out)):
        build = open_build(config)
        if pending := build.pending:
            _write(build, pending)
        return _finish(config, build.plan, build.out)


def pack_part(config: PackConfig, part: int, parts: int) -> None:
    """Write shards `part`, `part + parts`, ... of the plan: one job of a Slurm array.

    Call `make_plan` before the array; call `pack` after it, for the manifest and the shards of failed jobs. Raises
    `ShardError` if archive or settings have changed since the plan was made.
    """
    build = open_build(config, planned=True)
    numbers = range(part, len(build.plan.shards), parts)
    with locked(_lock(config), numbers), named_write_errors(build.out):
        mine = {build.plan.shards[number].name for number in numbers}
        shards = [shard for shard in build.pending if shard.name in mine]
        _check_unchanged(build, shards)
        _write(build, shards)


def make_plan(config: PackConfig) -> int:
    """Write the plan, which assigns studies to shards; returns the number of shards that are not written yet."""
    with locked(_lock(config)), named_write_errors(Path(config.out)):
        return len(open_build(config).pending)


def _lock(config: PackConfig) -> Path:
    return folders(config)[1] / BUILD / "lock"


def _check_unchanged(build: Build, shards: Sequence[PlannedShard]) -> None:
    """Raise `ShardError` if studies of these shards differ from the plan."""
    planned = [entry for shard in shards for entry in shard.entries]
    present = {entry.key: build.studies[entry.key] for entry in planned if entry.key in build.studies}
    now = survey(present, build.sample.root, build.sample.key, f"pack {build.config.source}, sizes of files").entries
    changed = sum(entry.key not in now or differs(entry, now[entry.key]) in ("labels", "size") for entry in planned)
    if changed:
        raise ShardError(
            f"pack.root: {changed} studies have changed or disappeared since {build.out} was planned; run the same "
            "`mama pack` again"
        )


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
    for planned in shards:
        lost = load_record(build.records, planned.name)
        tally = Tally()
        kept = tally.kept(islice(samples, len(planned.studies)))
        shard = write_shard(build.out, planned.name, planned.split, kept)
        if lost and lost.shard.sha256 != shard.sha256:
            log.warning("%s: rewritten with other bytes: mama or a decoder has another version now", planned.name)
            (build.out / MANIFEST).unlink(missing_ok=True)
        save_record(tally.record(shard), build.records)
    next(samples, None)  # ends the progress display and the workers


def _finish(config: PackConfig, plan: Plan, out: Path) -> Manifest:
    """Write `refused.jsonl` and the manifest from the records, unless they are up to date.

    Raises `ShardError` if no image was stored, and, after writing, if more than `max_refused` were refused.
    """
    records = list(records_of(plan, out / BUILD).values())
    refusals = [refusal for record in records for refusal in record.refusals]
    lines = refusal_lines(refusals)
    manifest = manifest_of(plan, records)
    refused = out / REFUSED
    if earlier_manifest(out) == manifest and refused.exists() and refused.read_bytes() == lines:
        log.info("%s is finished: %d studies, %d images", out, manifest.studies, manifest.images)
        _limit_refused(manifest, config.max_refused, refused)
        return manifest
    atomic_write(refused, lines)
    if not manifest.images:
        causes = Counter(f"{line.reason} ({line.message})" for line in refusals).most_common(1)
        most = "".join(f", {number} of them as {cause}" for cause, number in causes)
        raise ShardError(
            f"pack.root: {config.root} holds no usable image: {len(refusals)} are left out{most}, see {refused}; "
            "fix the archive or the options and run the same `mama pack` again"
        )
    save_manifest(manifest, out)
    _log_manifest(out, manifest)
    _log_not_understood(refusals)
    _limit_refused(manifest, config.max_refused, refused)
    return manifest


def _limit_refused(manifest: Manifest, max_refused: float, refused: Path) -> None:
    if manifest.refused_share > max_refused:
        raise ShardError(
            f"pack.max_refused: {manifest.refused_share:.1%} of the images were refused, {max_refused:.1%} are "
            f"allowed; see {refused}, fix the archive and run the same `mama pack` again, or raise pack.max_refused"
        )


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
    counts = ", ".join(f"{number} {split}" for split, number in manifest.patients.items())
    log.info("patients: %s. %s", counts, manifest.split_by or SplitBy("hash", {}))
    if manifest.raw:
        unprocessed = "unprocessed; pack.raw=processed, in another `out`, renders them"
        how = "rendered" if manifest.settings.get("raw") == "processed" else unprocessed
        log.warning("%d images are raw (FOR PROCESSING), stored %s", manifest.raw, how)
    for word, number in manifest.conflicts.items():
        log.warning("%d images: %s", number, CONFLICTS.get(word, word))
    for word, number in manifest.fallbacks.items():
        log.warning("%d images were rendered by %s", number, FALLBACKS.get(word, word))
    if manifest.duplicates:
        log.warning("%d images are stored in two studies; `mama check %s` names them", manifest.duplicates, out)


def _log_not_understood(refusals: Iterable[Refusal]) -> None:
    """Log the messages about views and labels: a misspelt view is excluded like any other."""
    messages = Counter((line.reason, line.message) for line in refusals if line.reason in ("other-view", "label"))
    for (reason, message), number in messages.most_common(MOST_MESSAGES):
        log.info("%s, %d images: %s", reason, number, message)
    if len(messages) > MOST_MESSAGES:
        log.info("%d more messages like these, see %s", len(messages) - MOST_MESSAGES, REFUSED)
