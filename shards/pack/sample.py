"""One study of a source -> one sample of a shard: the part of packing that runs in the workers."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from shards.errors import Refused, is_machine_error, one_line
from shards.files import legible
from shards.image.header import find_intent, find_spacing, find_vendor, is_volume
from shards.image.lesion_mask import mask_box
from shards.image.picture import PictureConfig
from shards.pack.identity import keyed_hash, patient_key, split_of
from shards.pack.implants import implant_of, in_whole_breasts
from shards.pack.stored_image import stored_image
from shards.pack.texts import LONGEST_REPORT, check_facts, check_text
from shards.processes import quiet
from shards.schema import RAW, Box, Finding, SourceStudy, SourceView, Study, View


@dataclass(frozen=True)
class SampleConfig:
    """The settings of `build_sample`. `quality` is that of JPEG; None stores lossless PNG."""

    source: str
    root: Path
    key: bytes
    picture: PictureConfig
    quality: int | None
    intent: Literal["presentation", "processing", "both"] = "presentation"  # which to keep if a view has both
    implants: bool = True  # record them; builds of earlier releases do not


@dataclass(frozen=True)
class Refusal:
    """One line of refused.jsonl: an image that is not stored. `file` is relative to the root of the archive."""

    file: str
    reason: str
    message: str


@dataclass(frozen=True)
class Sample:
    """A study with its encoded images, and its refused ones. The caller drops a study whose `images` is empty."""

    study: Study
    images: tuple[bytes, ...]
    refusals: tuple[Refusal, ...]

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of the tar members in their order."""
        yield f"{self.study.key}.json", self.study.to_json()
        for view, image in zip(self.study.views, self.images, strict=True):
            yield f"{self.study.key}.{view.member}", image


@dataclass(frozen=True)
class _Image:
    """An encoded image; `view.member` is only its suffix until it is known which images are kept."""

    source: SourceView
    view: View
    data: bytes
    volume: bool

    @property
    def raw(self) -> bool:
        return self.view.presentation_intent == RAW

    @property
    def place(self) -> tuple[str, str, bool]:
        """Images of the same place are alternatives; a tomosynthesis slab is no alternative to a 2D image."""
        return self.view.laterality, self.view.view, self.volume


def build_sample(config: SampleConfig, study: SourceStudy) -> Sample:
    """Read, crop and encode every image of a study. A bad image is refused and never stops a build.

    Raises `OSError` only for an error of the machine, e.g. a full disk.
    """
    images: list[_Image] = []
    refusals: list[Refusal] = []
    seen: set[str | None] = {None}
    for source in study.views:
        try:
            check_facts(study)
            with quiet():
                image = _build_image(config, source)
            if image.view.instance in seen - {None}:
                raise Refused("duplicate", "the study has another file of the same SOP Instance UID")
        except Exception as error:  # untrusted input: a parser or decoder may raise anything
            if isinstance(error, OSError) and is_machine_error(error):
                raise  # the image is not to blame; the same build can be continued
            refusals.append(refusal(config.root, source, error))
            continue
        seen.add(image.view.instance)
        images.append(image)
    views = in_whole_breasts((image.source, image.view) for image in images)
    images = [replace(image, view=view) for image, view in zip(images, views, strict=True)]
    images, others = _choose_intent(images, config.intent)
    refusals += [refusal(config.root, image.source, error) for image, error in others]
    sample = Study(
        key=study_key(config.key, config.source, study),
        patient=patient_key(config.key, config.source, study.patient_id),
        source=config.source,
        split=study.split or split_of(config.source, study.patient_id),
        views=tuple(replace(image.view, member=f"{n}.{image.view.member}") for n, image in enumerate(images)),
        age=study.age,
        race=study.race,
        ethnicity=study.ethnicity,
        reason=study.reason,
    )
    return Sample(sample, tuple(image.data for image in images), tuple(refusals))


def study_key(key: bytes, source: str, study: SourceStudy) -> str:
    """The keyed hash that names a study in shards, plan and records."""
    return keyed_hash(key, "study", source, study.patient_id, study.study_id)


def refusal(root: Path, source: SourceView, error: Exception) -> Refusal:
    """The line of refused.jsonl for an image and the error that kept it from being stored."""
    reason = error.reason if isinstance(error, Refused) else "unreadable"
    message = one_line(error)
    if not isinstance(error, Refused | OSError):
        message = f"its header or pixels are damaged in an unforeseen way ({message})"
    file = str(source.path.relative_to(root)) if source.path.is_relative_to(root) else source.path.name
    return Refusal(legible(file), reason, legible(message))


def refusal_lines(refusals: Iterable[Refusal]) -> bytes:
    """The content of a refused.jsonl."""
    return "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in refusals).encode()


def _choose_intent(images: Sequence[_Image], intent: str) -> tuple[list[_Image], list[tuple[_Image, Refused]]]:
    """(kept, excluded) images: of a place with both intents, only the images of the preferred one are kept.

    Every image that is not raw counts as FOR PRESENTATION. Images that were refused do not count: a raw image is kept
    if its presentation image is damaged.
    """
    kinds: dict[tuple[str, str, bool], set[bool]] = defaultdict(set)
    for image in images:
        kinds[image.place].add(image.raw)
    kept, others = [], []
    for image in images:
        if intent == "both" or image.raw == (intent == "processing") or len(kinds[image.place]) == 1:
            kept.append(image)
            continue
        which = "raw (FOR PROCESSING)" if image.raw else "for presentation"
        message = f"the image is {which}, and its view has another; pack.intent={intent} keeps that one"
        others.append((image, Refused("other-intent", message)))
    return kept, others


def _build_image(config: SampleConfig, source: SourceView) -> _Image:
    if source.refused:
        raise Refused(*source.refused)
    _check_path(source.path, config.root)
    check_text("report", source.report, LONGEST_REPORT, allowed="\n\t")
    stored = stored_image(source.path, config.picture, config.quality, source.laterality, source.view)
    picture, header = stored.picture, stored.header
    findings, unusable = _boxed(source, picture.original_size)
    implant, contradicted = implant_of(source, header) if config.implants else (None, ())
    instance = header.get("SOPInstanceUID")
    view = View(
        member="jpg" if config.quality else "png",
        laterality=str(stored.laterality),
        view=str(stored.view),
        size=picture.geometry.size,
        original_size=picture.original_size,
        pixel_spacing=find_spacing(header),
        crop=picture.geometry.original_crop(picture.original_size),
        flipped=picture.geometry.flipped,
        to_original=picture.geometry.to_original,
        labels=source.labels,
        findings=tuple(replace(f, box=f.box and picture.geometry.box_to_stored(f.box)) for f in findings),
        report=source.report,
        presentation_intent=find_intent(header),
        vendor=None if picture.header is None else find_vendor(header),
        instance=keyed_hash(config.key, "instance", str(instance)) if instance else None,
        processed=picture.processed,
        conflicts=stored.conflicts + unusable + contradicted,
        fallbacks=picture.fallbacks,
        implant=implant,
    )
    return _Image(source, view, stored.data, is_volume(header))


def _boxed(source: SourceView, size: tuple[int, int]) -> tuple[list[Finding], tuple[str, ...]]:
    """The findings with the boxes of their masks, in an original image of `size`; and words of CONFLICTS."""
    boxes = {number: mask_box(path, size) for number, path in source.masks}  # one mask is in memory at a time
    findings = [replace(finding, box=boxes.get(finding.number, finding.box)) for finding in source.findings]
    outside = any(finding.box and _is_outside(finding.box, size) for finding in findings)
    return findings, ("box",) * outside + ("mask",) * (None in boxes.values())


def _is_outside(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box does not overlap the original image of `size` (height, width)."""
    x0, y0, x1, y1 = box
    return x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]


def _check_path(path: Path, root: Path) -> None:
    """Raise `Refused` for a path of a table that leaves the archive. Symbolic links in the archive are followed."""
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root)):
        raise Refused("outside", "the path leaves the archive")
