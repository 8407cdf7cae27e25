"""One tar against its entry in the manifest: bytes, hash, members, facts, pictures. It is read once, front to back."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shards.read.manifest import Histograms, Shard, label_histograms
from shards.read.tar import Member, decode_image, members, open_shard, parse_study
from shards.schema import LATERALITIES, RAW, VIEWS, ShardError, Study, View

CHUNK = 2**20
MEND = "copy it again, or run the same `mama pack`, which writes a shard again that is gone or has another size"
SUFFIXES = {"jpeg": "jpg", "png": "png"}  # codec -> suffix


@dataclass
class Content:
    """What is in a tar: counts to compare with the manifest. After a problem they are not complete."""

    problems: list[str] = field(default_factory=list)
    images: int = 0
    raw: int = 0
    labels: Histograms = field(default_factory=dict)
    conflicts: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    instances: list[tuple[str, str, str]] = field(default_factory=list)  # instance, study key, member


class _Hashed:
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        return data


def check_shard(
    folder: Path, shard: Shard, source: str, settings: Mapping[str, Any], sample: int | None = None
) -> Content:
    """What size or hash refutes is one problem, and is not looked into further.

    All images are decoded, or `sample` of them, spread evenly over the shard.
    """
    try:
        with open_shard(folder / shard.name, CHUNK) as file:
            size = os.fstat(file.fileno()).st_size
            if size != shard.bytes:
                return _one(shard, f"has {size} bytes, the manifest says {shard.bytes}: cut or overwritten; {MEND}")
            hashed = _Hashed(file)
            walk = _Walk(shard, source, settings, sample)
            try:
                walk.walk(hashed, size)
            except ShardError as error:
                walk.tell(str(error))
            rest = 0
            while data := hashed.read(CHUNK):
                rest += len(data.strip(b"\0"))
    except FileNotFoundError:
        return _one(shard, f"is missing; {MEND}")
    except ShardError as error:
        return _one(shard, str(error))
    except OSError as error:
        return _one(shard, f"cannot be read: {error.strerror}")
    if hashed.sha256.hexdigest() != shard.sha256:
        return _one(shard, f"its SHA-256 differs from the manifest's: changed or damaged; remove it and {MEND}")
    if rest and not walk.content.problems:
        walk.tell("holds data behind its end mark")
    walk.content.raw = sum(view.presentation_intent == RAW for view in walk.views)
    walk.content.labels = label_histograms((shard.split, view) for view in walk.views)
    return walk.content


def _one(shard: Shard, problem: str) -> Content:
    return Content([f"{shard.name}: {problem}"])


class _Walk:
    def __init__(self, shard: Shard, source: str, settings: Mapping[str, Any], sample: int | None) -> None:
        self.shard, self.source, self.settings = shard, source, settings
        self.content = Content()
        self.views: list[View] = []
        total = sum(shard.view_counts)
        wanted = total if sample is None else min(sample, total)
        self.chosen = {number * total // wanted for number in range(wanted)}

    def tell(self, problem: str) -> None:
        self.content.problems.append(f"{self.shard.name}: {problem}")

    def walk(self, file: _Hashed, size: int) -> None:
        """Members in the order, at the places and with the contents that manifest and facts promise."""
        shard = self.shard
        found = members(file, size)
        for key, patient, count, offset in zip(
            shard.keys, shard.patients, shard.view_counts, shard.offsets, strict=True
        ):
            member, data = next(found, (None, b""))
            if member is None or (member.name, member.start) != (f"{key}.json", offset):
                raise ShardError(f"expected {key}.json at byte {offset}, found {_place(member)}")
            study = _study(member, data)
            told = (key, patient, self.source, shard.split, count)
            if (study.key, study.patient, study.source, study.split, len(study.views)) != told:
                self.tell(f"{member.name} differs from the manifest in key, patient, source, split or views")
            for view in study.views:
                member, data = next(found, (None, b""))
                if member is None or member.name != f"{key}.{view.member}":
                    raise ShardError(f"expected {key}.{view.member}, found {_place(member)}")
                self._picture(member, data, view)
                self._count(study, view)
        more = next(found, None)
        if more:
            self.tell(f"{more[0].name} is not in the manifest")

    def _picture(self, member: Member, data: bytes, view: View) -> None:
        settings = self.settings
        suffix = SUFFIXES.get(settings.get("codec", ""), "")
        if not member.name.endswith(suffix):
            self.tell(f"{member.name} is no .{suffix}, as the manifest's setting codec says")
        if max(view.size) > settings.get("long_side", max(view.size)):
            self.tell(f"{member.name} is larger than the manifest's setting long_side")
        if self.content.images not in self.chosen:
            return
        try:
            image = decode_image(data)
        except ShardError as error:
            self.tell(f"{member.name} does not decode: {error}")
            return
        if image.shape != tuple(view.size):
            self.tell(f"{member.name} does not decode to {view.size} pixels but to {image.shape}")
        if image.min() == image.max():
            self.tell(f"{member.name} shows nothing, all its pixels have one grey value; pack the archive anew")
        if 8 * image.itemsize != settings.get("bits", 8 * image.itemsize):
            self.tell(f"{member.name} has {8 * image.itemsize} bits, the manifest's setting bits differs")

    def _count(self, study: Study, view: View) -> None:
        self.content.images += 1
        self.content.conflicts.update(view.conflicts)
        self.content.fallbacks.update(view.fallbacks)
        self.views.append(view)
        if view.instance:
            self.content.instances.append((view.instance, study.key, view.member))


def _study(member: Member, data: bytes) -> Study:
    """Raises `ShardError` for facts that cannot be."""
    try:
        study = parse_study(data)
    except ShardError as error:
        raise ShardError(f"{member.name}: {error}") from None
    for number, view in enumerate(study.views):
        try:
            problem = _view_problem(view, number)
        except (AttributeError, TypeError, ValueError):
            problem = "a fact has another type than the schema's"
        if problem:
            raise ShardError(f"{member.name}: view {number}: {problem}")
    return study


def _place(member: Member | None) -> str:
    return f"{member.name} at byte {member.start}" if member else "the end of the file"


def _view_problem(view: View, number: int) -> str | None:
    (height, width), (a, b, tx, c, d, ty) = view.size, view.to_original
    x0, y0, x1, y1 = view.crop
    words = (view.instance or "", view.vendor or "", view.labels.pathology or "", *view.conflicts, *view.fallbacks)
    if not all(isinstance(word, str) for word in words):
        return "a fact has another type than the schema's"
    if view.laterality not in LATERALITIES or view.view not in VIEWS:
        return "its side or view is none of L, R, CC, MLO"
    if view.member not in (f"{number}.jpg", f"{number}.png"):
        return f"its member is no {number}.jpg or {number}.png"
    if min(height, width) < 1:
        return "it has no pixels"
    if not (0 <= x0 < x1 <= view.original_size[1] and 0 <= y0 < y1 <= view.original_size[0]):
        return "its crop lies outside of the original image"
    (left, right), (top, bottom) = sorted((tx, a * width + tx)), sorted((ty, d * height + ty))
    if b or c or (a < 0) != view.flipped or max(abs(left - x0), abs(right - x1)) > abs(a) + 1:
        return "its crop and its way back to the original disagree"
    if max(abs(top - y0), abs(bottom - y1)) > abs(d) + 1:
        return "its crop and its way back to the original disagree"
    for box in (finding.box for finding in view.findings if finding.box):
        if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            return "a finding's box lies outside of the image"
    return None
