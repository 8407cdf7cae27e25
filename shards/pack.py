"""`pack`: an archive of studies -> tar shards, `refused.jsonl` and, written last, `manifest.json`.

`refused.jsonl` stays with the shards and names files of the archive, which may hold identifiers:
leave it behind when the shards travel. The shards and the manifest hold none.
"""

from __future__ import annotations

import inspect
import json
import logging
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2

from shards.identity import keyed_hash, load_key
from shards.manifest import MANIFEST, Manifest, label_histograms, load_manifest, save_manifest, write_aside
from shards.progress import progress
from shards.sample import Refusal, Sample, SampleConfig, build_sample
from shards.schema import SPLITS, ShardError, SourceStudy, View
from shards.sources import SOURCES, resolve_root
from shards.writer import SplitWriter

log = logging.getLogger(__name__)

BUILDING = "building.json"  # stands in a folder from the first shard to the manifest
REFUSED = "refused.jsonl"
IN_FLIGHT = 4  # studies per worker that are under way or wait for their turn


@dataclass(frozen=True)
class PackConfig:
    """One archive, and how its images are stored."""

    source: str = ""  # a name in shards.sources.SOURCES
    root: str = ""  # the archive's folder, or package:NAME for one that an installed package brings
    out: str = ""  # a new folder, or that of an unfinished build
    options: dict[str, Any] = field(default_factory=dict)  # the source's own keywords
    long_side: int = 1024  # pixels; smaller images stay as they are
    quality: int = 95  # of the JPEGs
    crop: bool = True  # cut to the breast and blacken what lies outside of it
    samples_per_shard: int = 256  # studies
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    max_refused: float = 0.05  # the share of refused images above which a build fails
    key_file: str = "~/.config/mama/hash.key"  # the secret of the keyed hashes, created if it is not there


def pack(config: PackConfig) -> Manifest:
    """Build the shards of an archive; on a finished folder with the same settings, only return its manifest.

    The shards are the same bytes for the same archive, settings and key, whatever the number of workers.
    Raises `ShardError` for a mistake in the configuration, and after everything is written if more
    than `max_refused` of the images were refused.
    """
    _validate(config)
    root, out = resolve_root(config.root), Path(config.out).expanduser()
    options = _source_options(config)
    key = load_key(Path(config.key_file).expanduser())
    settings = _settings(config, options, key)
    if (out / MANIFEST).exists():
        manifest = load_manifest(out)
        _compare(settings, manifest.settings, out)
        log.info("%s is finished: %d studies, %d images", out, manifest.studies, manifest.images)
    else:
        _start(out, settings)
        studies = list(SOURCES[config.source](root, **options))
        build = partial(
            build_sample, SampleConfig(config.source, root, key, config.long_side, config.quality, config.crop)
        )
        samples = _in_order(build, studies, config.workers)
        samples = progress(samples, len(studies), f"pack {config.source}", "studies")
        manifest = _write(samples, config, settings, out)
    if manifest.refused_share > config.max_refused:
        raise ShardError(
            f"max_refused: {manifest.refused_share:.1%} of the images were refused, {config.max_refused:.1%} are "
            f"allowed; see {out / REFUSED}, mend the archive and give another `out`, or raise max_refused"
        )
    return manifest


def _write(samples: Iterable[Sample], config: PackConfig, settings: dict[str, Any], out: Path) -> Manifest:
    writers = {split: SplitWriter(out, split, config.samples_per_shard) for split in SPLITS}
    views: list[tuple[str, View]] = []
    refusals: list[Refusal] = []
    keys: set[str] = set()
    dropped = 0
    for sample in samples:
        refusals += sample.refusals
        if not sample.images:
            dropped += 1
            continue
        if sample.study.key in keys:
            raise ShardError(
                f"{config.source}: yields a study twice (key {sample.study.key}); its study_id must be unique"
            )
        keys.add(sample.study.key)
        writers[sample.study.split].add(sample)
        views += [(sample.study.split, view) for view in sample.study.views]
    shards = tuple(shard for writer in writers.values() for shard in writer.close())
    lines = [json.dumps(asdict(refusal), ensure_ascii=False) + "\n" for refusal in refusals]
    write_aside(out / REFUSED, "".join(lines).encode())
    if not shards:
        raise ShardError(f"{config.root}: no usable image ({len(refusals)} refused, see {out / REFUSED})")
    manifest = Manifest(
        source=config.source,
        settings=settings,
        versions={name: version(name) for name in ("numpy", "opencv-python-headless", "pydicom", "pylibjpeg")},
        images=len(views),
        images_refused=dict(sorted(Counter(refusal.reason for refusal in refusals).items())),
        studies_dropped=dropped,
        labels=label_histograms(views),
        shards=shards,
    )
    save_manifest(manifest, out)
    (out / BUILDING).unlink()
    log.info("%s: %d studies, %d images, %d refused", out, manifest.studies, manifest.images, len(refusals))
    return manifest


def _in_order(build: Callable[[SourceStudy], Sample], studies: Iterable[SourceStudy], workers: int) -> Iterator[Sample]:
    """`map` over processes, with a bounded number of studies under way: memory does not grow with the archive."""
    if workers == 1:
        yield from map(build, studies)
        return
    # spawn: the caller may hold threads (a tensor library), and those do not survive a fork
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Sample]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        try:
            for study in studies:
                waiting.append(pool.submit(build, study))
                if len(waiting) >= IN_FLIGHT * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ShardError("workers: a worker process died (out of memory?); try fewer workers") from None


def _start(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` ours: an empty folder, or one with the leftovers of a build that did not end."""
    out.mkdir(parents=True, exist_ok=True)
    leftovers = [*out.glob("*.tar"), *out.glob("*.part")]
    if leftovers and not (out / BUILDING).exists():
        raise ShardError(f"out: {out} holds {leftovers[0].name} of something else; give another `out`")
    for path in leftovers:
        path.unlink()
    write_aside(out / BUILDING, json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")


def _validate(config: PackConfig) -> None:
    if config.source not in SOURCES:
        raise ShardError(f"source: {config.source!r} is not one of {', '.join(sorted(SOURCES))}")
    for name in ("root", "out"):
        if not getattr(config, name):
            raise ShardError(f"{name}: is empty; name a folder")
    for name in ("long_side", "samples_per_shard", "workers"):
        if getattr(config, name) < 1:
            raise ShardError(f"{name}: {getattr(config, name)} is less than 1")
    if not 1 <= config.quality <= 100:
        raise ShardError(f"quality: {config.quality} is not in 1..100")
    if not 0 <= config.max_refused <= 1:
        raise ShardError(f"max_refused: {config.max_refused} is not a share in 0..1")


def _source_options(config: PackConfig) -> dict[str, Any]:
    """The source's keywords with its defaults filled in."""
    _, *parameters = inspect.signature(SOURCES[config.source]).parameters.values()
    known = {parameter.name: parameter.default for parameter in parameters}
    for name in config.options:
        if name not in known:
            names = f"knows {', '.join(known)}" if known else "has none"
            raise ShardError(f"options.{name}: source {config.source!r} {names}")
    return {**known, **config.options}


def _settings(config: PackConfig, options: dict[str, Any], key: bytes) -> dict[str, Any]:
    """What decides the bytes. Root and key enter as keyed hashes: enough to tell others apart, not to read them."""
    return {
        "source": config.source,
        "options": options,
        "long_side": config.long_side,
        "quality": config.quality,
        "crop": config.crop,
        "samples_per_shard": config.samples_per_shard,
        "key_file": keyed_hash(key, "key"),
        "root": keyed_hash(key, "root", config.root),
    }


def _compare(settings: dict[str, Any], finished: dict[str, Any], out: Path) -> None:
    different = [name for name, value in settings.items() if finished.get(name) != value]
    if different:
        raise ShardError(
            f"{different[0]}: {out} was packed with another value; give another `out` or remove that folder"
        )
