"""Verify one tar against its entry in the manifest: size, hash, members, studies and images, in one sequential read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import ShardError
from shards.read.manifest import Histograms, Shard, label_histograms
from shards.read.tar import Member, decode_image, members, open_shard, parse_study
from shards.schema import LATERALITIES, RAW, VIEWS, Study, View

CHUNK = 2**20
FIX = "copy it again, or run the same `mama pack`, which rewrites a shard that is missing or of another size"
OTHER_TYPE = "a field has another type than the schema's"
SUFFIXES = {"jpeg": "jpg", "png": "png"}  # codec -> suffix


@dataclass
class Content:
    """Counts over a tar, to compare with the manifest. They are incomplete if there are problems."""

    problems: list[str] = field(default_factory=list)
    images: int = 0
    raw: int = 0
    labels: Histograms = field(default_factory=dict)
    conflicts: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    instances: list[tuple[str, str, str]] = field(default_factory=list)  # instance, study key, member


class _Hashed:
    """Hash a file while reading it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        return data


def check_shard(folder: Path, shard: Shard, source: str, settings: Mapping[str, Any], sample: int | None) -> Content:
    """Verify the tar of `shard` in `folder`. If its size or hash is wrong, nothing else is reported.

    All images are decoded, or `sample` of them, spread evenly over the shard.
    """
    try:
        with open_shard(folder / shard.name, CHUNK) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                return _one(shard, f"has {size} bytes, {shard.bytes} in the manifest: cut or overwritten; {FIX}")
            hashed = _Hashed(file)
            walk = _Walk(shard, source, settings, sample)
            try:
                walk.walk(hashed, size)
            except ShardError as error:
                walk.report(str(error))
            rest = 0
            while data := hashed.read(CHUNK):
                rest += len(data.strip(b"\0"))
    except FileNotFoundError:
        return _one(shard, f"is missing; {FIX}")
    except ShardError as error:
        return _one(shard, str(error))
    except OSError as error:
        return _one(shard, f"cannot be read: {error.strerror}")
    if hashed.sha256.hexdigest() != shard.sha256:
        return _one(shard, f"its SHA-256 differs from the manifest's: changed or damaged; remove it and {FIX}")
    if rest and not walk.content.problems:
        walk.report("holds data after its end mark")
    walk.content.raw = sum(view.presentation_intent == RAW for view in walk.views)
    walk.content.labels = label_histograms((shard.split, view) for view in walk.views)
    return walk.content


def _one(shard: Shard, problem: str) -> Content:
    return Content([f"{shard.name}: {problem}"])


class _Walk:
    """One pass over the members of a tar."""

    def __init__(self, shard: Shard, source: str, settings: Mapping[str, Any], sample: int | None) -> None:
        self.shard, self.source, self.settings = shard, source, settings
        self.content = Content()
        self.views: list[View] = []
        total = sum(shard.view_counts)
        number = total if sample is None else min(sample, total)
        self.chosen = {n * total // number for n in range(number)}  # images to decode

    def report(self, problem: str) -> None:
        self.content.problems.append(f"{self.shard.name}: {problem}")

    def walk(self, file: _Hashed, size: int) -> None:
        """Compare order, offsets and contents of the members with the manifest and the studies."""
        shard = self.shard
        found = members(file, size)
        for key, patient, count, offset in zip(
            shard.keys, shard.patients, shard.view_counts, shard.offsets, strict=True
        ):
            member, data = next(found, (None, b""))
            if member is None or (member.name, member.start) != (f"{key}.json", offset):
                raise ShardError(f"expected {key}.json at byte {offset}, found {_place(member)}")
            study = _study(member, data)
            listed = (key, patient, self.source, shard.split, count)
            if (study.key, study.patient, study.source, study.split, len(study.views)) != listed:
                self.report(f"{member.name} differs from the manifest in key, patient, source, split or views")
            for view in study.views:
                member, data = next(found, (None, b""))
                if member is None or member.name != f"{key}.{view.member}":
                    raise ShardError(f"expected {key}.{view.member}, found {_place(member)}")
                self._picture(member, data, view)
                self._count(study, view)
        more = next(found, None)
        if more:
            self.report(f"{more[0].name} is not in the manifest")

    def _picture(self, member: Member, data: bytes, view: View) -> None:
        settings = self.settings
        suffix = SUFFIXES.get(settings.get("codec", ""), "")
        if not member.name.endswith(suffix):
            self.report(f"{member.name} is not a .{suffix}, the manifest's setting codec")
        if max(view.size) > settings.get("long_side", max(view.size)):
            self.report(f"{member.name} is larger than the manifest's setting long_side")
        if self.content.images not in self.chosen:
            return
        try:
            image = decode_image(data)
        except ShardError as error:
            self.report(f"{member.name} does not decode: {error}")
            return
        if image.shape != tuple(view.size):
            self.report(f"{member.name} does not decode to {view.size} pixels but to {image.shape}")
        if image.min() == image.max():
            self.report(f"{member.name} is blank, all pixels have one grey value; pack the archive into another `out`")
        if 8 * image.itemsize != settings.get("bits", 8 * image.itemsize):
            self.report(f"{member.name} has {8 * image.itemsize} bits, the manifest's setting bits differs")

    def _count(self, study: Study, view: View) -> None:
        self.content.images += 1
        self.content.conflicts.update(view.conflicts)
        self.content.fallbacks.update(view.fallbacks)
        self.views.append(view)
        if view.instance:
            self.content.instances.append((view.instance, study.key, view.member))


def _study(member: Member, data: bytes) -> Study:
    """The study in a JSON member. Raises `ShardError` if it is damaged or contradicts itself."""
    try:
        study = parse_study(data)
    except ShardError as error:
        raise ShardError(f"{member.name}: {error}") from None
    for number, view in enumerate(study.views):
        try:
            problem = _view_problem(view, number)
        except (AttributeError, TypeError, ValueError):
            problem = OTHER_TYPE
        if problem:
            raise ShardError(f"{member.name}: view {number}: {problem}")
    return study


def _place(member: Member | None) -> str:
    return f"{member.name} at byte {member.start}" if member else "the end of the file"


def _view_problem(view: View, number: int) -> str | None:
    """The first contradiction in the metadata of view `number`, or None."""
    (height, width), (a, b, tx, c, d, ty) = view.size, view.to_original
    x0, y0, x1, y1 = view.crop
    words = (view.instance or "", view.vendor or "", view.labels.pathology or "", *view.conflicts, *view.fallbacks)
    if not all(isinstance(word, str) for word in words) or not isinstance(view.implant, bool | None):
        return OTHER_TYPE
    if view.laterality not in LATERALITIES or view.view not in VIEWS:
        return "its laterality or view is not one of L, R, CC, MLO"
    if view.member not in (f"{number}.jpg", f"{number}.png"):
        return f"its member is not {number}.jpg or {number}.png"
    if min(height, width) < 1:
        return "it has no pixels"
    if not (0 <= x0 < x1 <= view.original_size[1] and 0 <= y0 < y1 <= view.original_size[0]):
        return "its crop lies outside the original image"
    (left, right), (top, bottom) = sorted((tx, a * width + tx)), sorted((ty, d * height + ty))
    horizontal, vertical = max(abs(left - x0), abs(right - x1)), max(abs(top - y0), abs(bottom - y1))
    if b or c or (a < 0) != view.flipped or horizontal > abs(a) + 1 or vertical > abs(d) + 1:
        return "its crop contradicts its affine to_original"
    for box in (finding.box for finding in view.findings if finding.box):
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            return "the box of a finding lies outside the image"
    return None
