"""`pack`: an archive of studies -> tar shards, `refused.jsonl` and, written last, `manifest.json`.

`refused.jsonl` and the folder `build` stay with the shards and name files of the archive, which may hold
identifiers: leave them behind when the shards travel. The shards and the manifest hold none.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from shards.config import PackConfig
from shards.identity import keyed_hash, load_key
from shards.lock import locked
from shards.manifest import BUILD, MANIFEST, REFUSED, Manifest, load_manifest, save_manifest, write_aside
from shards.picture import PictureConfig
from shards.plan import Plan, PlannedShard, digest_of, extend, listed, load_plan, save_plan
from shards.progress import progress
from shards.record import Record, Tally, load_record, manifest_of, save_record
from shards.sample import Refusal, Sample, SampleConfig
from shards.schema import FALLBACKS, ShardError, SourceStudy
from shards.sources import SOURCES, resolve_root
from shards.workers import in_order
from shards.writer import full_disk_told, write_shard

log = logging.getLogger(__name__)

BEFORE = {"intent": "both", "raw": "stored"}  # what builds did that were begun before there were these settings
LISTED_VIEWS = 8  # of the other views that were met
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
        return [shard for shard in self.plan.shards if load_record(self.records, shard.name) is None]


def pack(config: PackConfig) -> Manifest:
    """Build the shards of an archive; in a folder of an earlier build only what is missing there.

    A build that was interrupted continues and ends in the bytes of one that was not; studies that came to
    the archive since add shards, and the shards that are there are not touched. The bytes depend on
    archive, settings and key, not on the number of workers. Raises `ShardError` for a mistake in the
    configuration, for a folder that another process is building, and after everything is written if more
    than `max_refused` of the images were refused.
    """
    with locked(_lock(config)), full_disk_told(Path(config.out)):
        build = open_build(config)
        manifest = load_manifest(build.out) if (build.out / MANIFEST).exists() else None
        if manifest is None or len(manifest.shards) < len(build.plan.shards):
            _write(build, build.pending)
            return finish(build)
        log.info("%s is finished: %d studies, %d images", build.out, manifest.studies, manifest.images)
        _limit_refused(manifest, config)
        return manifest


def pack_part(config: PackConfig, part: int, parts: int) -> None:
    """Write every `parts`-th shard of the plan, from number `part` on: the work of one job of an array.

    `make_plan` comes before it; `pack` comes after it for the manifest, and for what a lost job left.
    """
    build = open_build(config, planned=True)
    numbers = range(part, len(build.plan.shards), parts)
    with locked(_lock(config), numbers), full_disk_told(build.out):
        mine = {build.plan.shards[number].name for number in numbers}
        _write(build, [shard for shard in build.pending if shard.name in mine])


def make_plan(config: PackConfig) -> int:
    """Decide which study goes where; returns the number of shards that are still to be written."""
    with locked(_lock(config)), full_disk_told(Path(config.out)):
        return len(open_build(config).pending)


def open_build(config: PackConfig, planned: bool = False) -> Build:
    """List the archive, and begin, continue or extend the plan in `out`. With `planned` the plan stays as it is."""
    _validate(config)
    root, out = resolve_root(config.root), Path(os.path.expanduser(config.out))
    options = _source_options(config)
    key = load_key(Path(os.path.expanduser(config.key_file)))
    plan = load_plan(out / BUILD)
    config = _as_begun(config, plan)
    settings = _settings(config, options, key)
    if plan is None:
        if (out / MANIFEST).exists() or any(out.glob("*.tar")):
            raise ShardError(f"out: {out} holds shards of something else; give another `out`")
        plan = Plan(settings, {name: version(name) for name in DECODERS}, ())
    _compare(settings, {**BEFORE, **plan.settings}, out)
    studies = listed(SOURCES[config.source](root, **options), config.source, key)
    digests = {name: digest_of(study, root, key) for name, study in studies.items()}
    _compare_studies(plan, digests, out)
    if not planned:
        plan = extend(plan, studies, digests, config.samples_per_shard)
        if not plan.shards:
            raise ShardError(f"{config.root}: holds no study")
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


def finish(build: Build) -> Manifest:
    """Add the records up to `refused.jsonl` and the manifest."""
    records = [load_record(build.records, shard.name) for shard in build.plan.shards]
    done = [record for record in records if record is not None]
    refusals = [refusal for record in done for refusal in record.refusals]
    lines = [json.dumps(asdict(refusal), ensure_ascii=False) + "\n" for refusal in refusals]
    write_aside(build.out / REFUSED, "".join(lines).encode())
    manifest = manifest_of(build.plan, done)
    if not manifest.images:
        raise ShardError(
            f"{build.config.root}: no usable image ({len(refusals)} refused, see {build.out / REFUSED}); "
            "mend the archive and give another `out`"
        )
    save_manifest(manifest, build.out)
    left_out = {**manifest.images_excluded, **manifest.images_refused}
    log.info(
        "%s: %d studies; of %d images %d stored, %d left out (%s)",
        build.out,
        manifest.studies,
        manifest.listed,
        manifest.images,
        len(refusals),
        ", ".join(f"{number} {reason}" for reason, number in left_out.items()) or "none",
    )
    _name_other_views(refusals)
    if manifest.raw:
        how = (
            "rendered"
            if manifest.settings.get("raw") == "processed"
            else "as they are; pack.raw=processed, in another `out`, renders them"
        )
        log.warning("%d images are raw (FOR PROCESSING), stored %s", manifest.raw, how)
    for fact, number in manifest.conflicts.items():
        log.warning("%d images: table and header disagree about the %s; the table counts", number, fact)
    for word, number in manifest.fallbacks.items():
        log.warning("%d images were rendered by %s", number, FALLBACKS.get(word, word))
    if manifest.duplicates:
        log.warning("%d images are stored in two studies; `mama check %s` names them", manifest.duplicates, build.out)
    _limit_refused(manifest, build.config)
    return manifest


def _name_other_views(refusals: Iterable[Refusal]) -> None:
    """A misspelt view is left out like any other view: only its own word tells the two apart."""
    views = Counter(refusal.message for refusal in refusals if refusal.reason == "other-view")
    for message, number in views.most_common(LISTED_VIEWS):
        log.info("other-view, %d images: %s", number, message)
    if len(views) > LISTED_VIEWS:
        log.info("other-view: %d more kinds, see %s", len(views) - LISTED_VIEWS, REFUSED)


def _write(build: Build, shards: Sequence[PlannedShard]) -> None:
    studies = [build.studies[key] for shard in shards for key, _ in shard.studies]
    workers = build.config.workers or len(os.sched_getaffinity(0))
    counts: Counter[str] = Counter()

    def counted() -> Iterator[Sample]:
        for sample in in_order(build.sample, studies, workers):
            counts.update({"kept": len(sample.images), "left out": len(sample.refusals)})
            yield sample

    def note() -> str:
        return f"{counts['kept']} images kept, {counts['left out']} left out"

    samples = progress(counted(), len(studies), f"pack {build.config.source}", "studies", note)
    for shard in shards:
        save_record(_write_shard(build.out, shard, samples), build.records)
    next(samples, None)  # ends the display and the workers


def _write_shard(out: Path, planned: PlannedShard, samples: Iterator[Sample]) -> Record:
    tally = Tally()
    shard = write_shard(out, planned.name, planned.split, tally.kept(islice(samples, len(planned.studies))))
    return tally.record(shard)


def _validate(config: PackConfig) -> None:
    if config.source not in SOURCES:
        raise ShardError(f"source: {config.source!r} is not one of {', '.join(sorted(SOURCES))}")
    for name in ("root", "out"):
        if not getattr(config, name):
            raise ShardError(f"{name}: is empty; name a folder")
    for name, least in (("long_side", 1), ("samples_per_shard", 1), ("workers", 0)):
        if getattr(config, name) < least:
            raise ShardError(f"{name}: {getattr(config, name)} is less than {least}")
    if not 1 <= config.quality <= 100:
        raise ShardError(f"quality: {config.quality} is not in 1..100")
    if config.codec == "jpeg" and config.bits == 16:
        raise ShardError("bits: JPEG holds 8; write codec=png for 16")
    if not 0 <= config.max_refused <= 1:
        raise ShardError(f"max_refused: {config.max_refused} is not a share in 0..1")


def _lock(config: PackConfig) -> Path:
    _validate(config)
    return Path(os.path.expanduser(config.out)) / BUILD / "lock"


def _source_options(config: PackConfig) -> dict[str, Any]:
    """The source's keywords with its defaults filled in."""
    _, *parameters = inspect.signature(SOURCES[config.source]).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters}
    for name in config.options:
        if name not in known:
            names = f"knows {', '.join(known)}" if known else "has none"
            raise ShardError(f"options.{name}: source {config.source!r} {names}")
    options = {**known, **config.options}
    for name, value in options.items():
        if value is inspect.Parameter.empty:
            raise ShardError(f"options.{name}: source {config.source!r} needs it")
        _check_option(name, value, known[name])
    return options


def _check_option(name: str, value: Any, default: Any) -> None:
    """A whole number where the source has one, and no number in the place of a text, which 1.10 may have become."""
    kinds = {int: "a whole number", str: "a text; write it in quotes"}
    wanted = str if default is None and isinstance(value, bool | int | float) else type(default)
    if wanted in kinds and type(value) is not wanted:
        raise ShardError(f"options.{name}: {value!r} is not {kinds[wanted]}")


def _settings(config: PackConfig, options: dict[str, Any], key: bytes) -> dict[str, Any]:
    """What decides the bytes. Root and key enter as keyed hashes: enough to tell others apart, not to read them."""
    plain = ("source", "long_side", "codec", "bits", "quality", "crop", "flip", "reduced_jpeg2000", "tomosynthesis")
    return {
        **{name: getattr(config, name) for name in (*plain, *BEFORE)},
        "options": json.loads(json.dumps(options)),  # as the plan gives them back: keys are texts
        "samples_per_shard": config.samples_per_shard,
        "key_file": keyed_hash(key, "key"),
        "root": keyed_hash(key, "root", config.root),
    }


def _as_begun(config: PackConfig, plan: Plan | None) -> PackConfig:
    """A build that was begun before there was `intent` ends as it was begun, whatever today's default is."""
    if plan is None or "intent" in plan.settings or config.intent != PackConfig.intent:
        return config
    log.info("intent: %s was begun when raw images were kept beside others, and still keeps both", config.out)
    return replace(config, intent="both")


def _compare(settings: dict[str, Any], earlier: dict[str, Any], out: Path) -> None:
    different = [name for name, value in settings.items() if earlier.get(name) != value]
    if different:
        raise ShardError(
            f"{different[0]}: {out} was packed with another value; give another `out` or remove that folder"
        )


def _compare_studies(plan: Plan, digests: Mapping[str, str], out: Path) -> None:
    """Shards are never changed: what came to a packed study since is told, and a half-built archive must not change."""
    planned = plan.digests
    changed = [key for key, digest in planned.items() if digests.get(key) != digest]
    if not changed:
        return
    if (out / MANIFEST).exists() and all(key in digests for key in changed):
        log.warning(
            "%d studies have other files or labels now; their shards stay as they are: give another `out` to take the "
            "changes up",
            len(changed),
        )
        return
    raise ShardError(
        f"root: {len(changed)} studies of {out} have changed or gone since its plan was made; give another `out`, or "
        "remove that folder"
    )


def _limit_refused(manifest: Manifest, config: PackConfig) -> None:
    if manifest.refused_share > config.max_refused:
        raise ShardError(
            f"max_refused: {manifest.refused_share:.1%} of the images were refused, {config.max_refused:.1%} are "
            f"allowed; see {Path(config.out) / REFUSED}, mend the archive and give another `out`, or raise max_refused"
        )
