"""`mama check`: verify folders of shards against their manifests, and against each other. No file is trusted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shards.check.check_build import REPACK, build_problems
from shards.check.check_shard import Content, check_shard
from shards.errors import ShardError
from shards.progress import progress
from shards.read.manifest import MANIFEST, Manifest, add_histograms, load_manifest
from shards.schema import SPLITS

SHOWN = 5  # problems of one kind in one place; the others are counted


@dataclass(frozen=True)
class _Set:
    manifest: Manifest
    contents: tuple[Content, ...]  # one a shard, in the manifest's order


def check(folder: Path, sample: int | None = None) -> list[str]:
    """The problems of one folder of shards, one line each; empty if it is good. See `check_all`."""
    return check_all([folder], sample)[Path(folder)]


def check_all(folders: Iterable[Path], sample: int | None = None) -> dict[Path, list[str]]:
    """The problems of each folder, including those between folders.

    Every byte is read and hashed. Every image is decoded, or with `sample` that many in each shard, always the same
    ones. A study, an image or a patient in two folders is reported at the later folder.
    """
    problems: dict[Path, list[str]] = {}
    good: dict[Path, _Set] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        problems[folder], found = _check_set(folder, sample)
        twin = next((other for other in good if other.resolve() == folder.resolve()), None)
        if twin:
            problems[folder].append(f"is the same folder as {twin}; name it once")
        elif found:
            problems[folder] += _across(found, good)
            good[folder] = found
    return problems


def _check_set(folder: Path, sample: int | None) -> tuple[list[str], _Set | None]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        return [f"{what}; give a folder that `mama pack` wrote"], None
    try:
        manifest = load_manifest(folder)
    except ShardError as error:
        unfinished = [] if (folder / MANIFEST).exists() else build_problems(folder, None)
        return unfinished or [str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}{os.sep}")], None
    problems = [*build_problems(folder, manifest), *_check_entries(manifest)]
    if any("entry in the manifest" in problem for problem in problems):
        return problems, None
    work = partial(check_shard, folder, source=manifest.source, settings=manifest.settings, sample=sample)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing and decoding release the GIL
        found = pool.map(work, manifest.shards)
        contents = tuple(progress(found, len(manifest.shards), "check", "shards"))
    for shard, content in zip(manifest.shards, contents, strict=True):
        problems += few(content.problems, shard.name)
    problems += few(_same_images(manifest, contents), "images")
    # With a damaged shard the totals differ, too; the cause has been reported already.
    if not any(content.problems for content in contents):
        problems += _check_totals(manifest, contents, problems)
    return problems, _Set(manifest, contents)


def few(problems: Sequence[str], where: str) -> list[str]:
    """The first `SHOWN` problems, and a line with the number of the others."""
    more = len(problems) - SHOWN
    return [*problems[:SHOWN], *([f"{where}: and {more} more like these"] if more > 0 else [])]


def _check_entries(manifest: Manifest) -> list[str]:
    """Problems of the manifest's entries: unknown splits, repeated names or keys, patients in two splits."""
    problems: list[str] = []
    twice, leaking = [], []
    shard_of: dict[str, str] = {}
    split_of: dict[str, str] = {}
    names = Counter(shard.name for shard in manifest.shards)
    for shard in manifest.shards:
        lengths = {len(c) for c in (shard.keys, shard.patients, shard.view_counts, shard.offsets)}
        if shard.split not in SPLITS or shard.name.split("-")[0] != shard.split or lengths != {shard.samples}:
            problems.append(f"{shard.name}: its entry in the manifest was edited or damaged; {REPACK}")
        elif names[shard.name] > 1:
            problems.append(f"{shard.name}: has a second entry in the manifest; {REPACK}")
        for key in shard.keys:
            if key in shard_of:
                twice.append(f"{shard.name}: key {key} is also in {shard_of[key]}; {REPACK}")
            shard_of[key] = shard.name
        for patient in dict.fromkeys(shard.patients):
            other = split_of.setdefault(patient, shard.split)
            if other != shard.split:
                leaking.append(f"{shard.name}: patient {patient} is in the splits {other} and {shard.split}")
    return [*dict.fromkeys(problems), *few(twice, "keys"), *few(leaking, "patients")]


def _same_images(manifest: Manifest, contents: Sequence[Content]) -> list[str]:
    """Images that are stored twice, by the hash of their SOP instance."""
    problems = []
    first: dict[str, tuple[str, str]] = {}
    for instance, where, split in _images(manifest, contents):
        if instance in first:
            other, other_split = first[instance]
            apart = f", which is in the split {other_split}" if other_split != split else ""
            problems.append(f"image {where} is the same as {other}{apart}; keep one of them in the archive")
        else:
            first[instance] = where, split
    return problems


def _images(manifest: Manifest, contents: Sequence[Content]) -> Iterator[tuple[str, str, str]]:
    """Yield (instance, <key>.<member>, split) of every image with a SOP instance."""
    for shard, content in zip(manifest.shards, contents, strict=True):
        for instance, key, member in content.instances:
            yield instance, f"{key}.{member}", shard.split


def _check_totals(manifest: Manifest, contents: Sequence[Content], earlier: Sequence[str]) -> list[str]:
    """Totals of the manifest that differ from the shards; `earlier` are the problems found so far."""
    problems = []
    images = sum(content.images for content in contents)
    reported = any(problem.startswith((f"{MANIFEST}: listed", f"{MANIFEST}: images_")) for problem in earlier)
    left_out = sum(manifest.images_refused.values()) + sum(manifest.images_excluded.values())
    instances = [instance for content in contents for instance, _, _ in content.instances]
    if images != manifest.images:
        problems.append(f"{MANIFEST}: {manifest.images} images, but the shards hold {images}; {REPACK}")
    elif images + left_out != manifest.listed and not reported:
        problems.append(f"{MANIFEST}: {images} images stored, {left_out} left out, {manifest.listed} listed; {REPACK}")
    if manifest.raw is not None and sum(content.raw for content in contents) != manifest.raw:
        problems.append(f"{MANIFEST}: its number of raw images differs from the shards; {REPACK}")
    if add_histograms(content.labels for content in contents) != manifest.labels:
        problems.append(f"{MANIFEST}: its label histograms differ from the labels in the shards; {REPACK}")
    for name in ("conflicts", "fallbacks"):
        counted: Counter[str] = sum((getattr(content, name) for content in contents), Counter())
        if counted != Counter(getattr(manifest, name)):
            problems.append(f"{MANIFEST}: its {name} differ from those in the shards; {REPACK}")
    told = any(problem.startswith(f"{MANIFEST}: split_by") for problem in earlier)
    if manifest.split_by and manifest.split_by.patients != manifest.patients and not told:
        problems.append(f"{MANIFEST}: its numbers of patients by split differ from the shards; {REPACK}")
    if len(instances) - len(set(instances)) != manifest.duplicates:
        problems.append(f"{MANIFEST}: its number of duplicates differs from the shards; {REPACK}")
    return problems


def _across(found: _Set, others: Mapping[Path, _Set]) -> list[str]:
    """Studies, images and patients' splits in conflict with another folder: one line for each kind and folder."""
    problems = []
    for path, other in others.items():
        keys = {key for shard in other.manifest.shards for key in shard.keys}
        split_of = {patient: shard.split for shard in other.manifest.shards for patient in shard.patients}
        images = {instance: where for instance, where, _ in _images(other.manifest, other.contents)}
        same = [key for shard in found.manifest.shards for key in shard.keys if key in keys]
        leaking = {
            f"{patient}, {shard.split} here and {split_of[patient]} there"
            for shard in found.manifest.shards
            for patient in shard.patients
            if split_of.get(patient, shard.split) != shard.split
        }
        same_images = [
            f"{where} is {images[instance]}"
            for instance, where, _ in _images(found.manifest, found.contents)
            if instance in images and where.partition(".")[0] not in keys
        ]
        for what, where in (
            (f"studies are also in {path}", same),
            (f"patients are in another split in {path}", sorted(leaking)),
            (f"images are also in {path}", same_images),
        ):
            if where:
                problems.append(f"{len(where)} {what} ({where[0]}{', ...' * (len(where) > 1)}); use one of the two")
    return problems
