"""Does a folder of shards hold what its manifest says? Nothing else is trusted, the manifest included."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import cv2
import numpy as np

from shards.manifest import Manifest, Shard, label_histograms, load_manifest
from shards.progress import progress
from shards.schema import SPLITS, ShardError, Study, View


def check(folder: Path) -> list[str]:
    """All problems of a folder of shards, one line each; empty if it is good. Every image is decoded."""
    folder = Path(folder)
    try:
        manifest = load_manifest(folder)
    except ShardError as error:
        return [str(error)]
    problems = _check_manifest(manifest)
    listed = {shard.name for shard in manifest.shards}
    problems += [
        f"{path.name}: not in the manifest" for path in sorted(folder.glob("*.tar")) if path.name not in listed
    ]
    views: list[tuple[str, View]] = []
    damaged = False
    for shard in progress(manifest.shards, len(manifest.shards), "check", "shards"):
        found, studies = _check_shard(folder / shard.name, shard)
        damaged = damaged or bool(found)
        problems += found
        views += [(shard.split, view) for study in studies for view in study.views]
    # Behind a damaged shard the totals are wrong for a reason that has been told already.
    if not damaged and len(views) != manifest.images:
        problems.append(f"manifest.json: says {manifest.images} images, the shards hold {len(views)}")
    if not damaged and label_histograms(views) != manifest.labels:
        problems.append("manifest.json: its label histograms differ from the labels in the shards")
    return problems


def _check_manifest(manifest: Manifest) -> list[str]:
    """Keys unique over all shards, known splits, and no patient in two of them."""
    problems = []
    shard_of: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for shard in manifest.shards:
        lengths = {len(c) for c in (shard.keys, shard.patients, shard.view_counts, shard.offsets)}
        if shard.split not in SPLITS or lengths != {shard.samples}:
            problems.append(f"{shard.name}: its entry in the manifest was edited or damaged")
        for key in shard.keys:
            if key in shard_of:
                problems.append(f"{shard.name}: key {key} is also in {shard_of[key]}")
            shard_of[key] = shard.name
        for patient in dict.fromkeys(shard.patients):
            other = split_of.setdefault(patient, shard.split)
            if other != shard.split:
                problems.append(f"{shard.name}: patient {patient} is in the splits {other} and {shard.split}")
    return problems


def _check_shard(path: Path, shard: Shard) -> tuple[list[str], list[Study]]:
    """Problems of one tar and the studies in it. What the hash refutes is not looked into further."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return [f"{shard.name}: is missing"], []
    except OSError as error:
        return [f"{shard.name}: cannot be read: {error.strerror}"], []
    if size != shard.bytes:
        return [f"{shard.name}: has {size} bytes, the manifest says {shard.bytes}: cut or overwritten"], []
    if digest != shard.sha256:
        return [f"{shard.name}: its SHA-256 differs from the manifest's: the content was changed or damaged"], []
    try:
        return _check_samples(path, shard)
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
        return [f"{shard.name}: cannot be read as a tar of studies: {error}"], []


def _check_samples(path: Path, shard: Shard) -> tuple[list[str], list[Study]]:
    """Members in the order, at the places and with the contents that manifest and study facts promise."""
    problems: list[str] = []
    studies: list[Study] = []
    with tarfile.open(path) as tar:
        members = iter(tar.getmembers())
        for key, patient, count, offset in zip(
            shard.keys, shard.patients, shard.view_counts, shard.offsets, strict=True
        ):
            info = next(members, None)
            if info is None or info.name != f"{key}.json" or info.offset != offset:
                found = info.name if info else "the end of the file"
                return [*problems, f"{shard.name}: expected {key}.json at byte {offset}, found {found}"], studies
            study = Study.from_json(_read(tar, info))
            studies.append(study)
            if (study.key, study.patient, study.split, len(study.views)) != (key, patient, shard.split, count):
                problems.append(f"{shard.name}: {info.name} differs from the manifest in key, patient, split or views")
            for view in study.views:
                info = next(members, None)
                if info is None or info.name != f"{key}.{view.member}":
                    found = info.name if info else "the end of the file"
                    return [*problems, f"{shard.name}: expected {key}.{view.member}, found {found}"], studies
                image = cv2.imdecode(np.frombuffer(_read(tar, info), dtype=np.uint8), cv2.IMREAD_UNCHANGED)
                if image is None or image.shape != view.size:
                    problems.append(f"{shard.name}: {info.name} does not decode to an image of {view.size}")
        problems += [f"{shard.name}: {info.name} is not in the manifest" for info in members]
    return problems, studies


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return file.read() if file else b""
