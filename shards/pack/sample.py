"""One study of a source -> one sample of a shard. This is the part of packing that runs in every worker."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from shards.errors import is_of_the_machine
from shards.files import legible
from shards.image.crop import Geometry
from shards.image.header import find_intent, find_laterality, find_spacing, find_vendor, find_view, is_volume
from shards.image.picture import Picture, PictureConfig, read_picture
from shards.pack.identity import keyed_hash, split_of
from shards.processes import quiet
from shards.schema import LATERALITIES, RAW, VIEWS, Box, Finding, Refused, SourceStudy, SourceView, Study, View

FACTS = ("race", "ethnicity", "reason")
LONGEST_FACT, LONGEST_REPORT = 64, 20_000  # characters
# All that Unicode and old systems call the end of a line, a paragraph or a page: Windows, Mac, mainframe, form feed.
LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")


@dataclass(frozen=True)
class SampleConfig:
    """What `build_sample` needs to know besides the study. `quality` of JPEG; None stores lossless PNG."""

    source: str
    root: Path
    key: bytes
    picture: PictureConfig
    quality: int | None
    intent: Literal["presentation", "processing", "both"] = "presentation"  # kept where a view has both


@dataclass(frozen=True)
class Refusal:
    """One line of refused.jsonl. `file` is relative to the source's root; it names files of the archive."""

    file: str
    reason: str
    message: str


@dataclass(frozen=True)
class Sample:
    """A study without images (`images` empty) is dropped by the caller; its refusals say why."""

    study: Study
    images: tuple[bytes, ...]
    refusals: tuple[Refusal, ...]

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of the tar members, in their order."""
        yield f"{self.study.key}.json", self.study.to_json()
        for view, image in zip(self.study.views, self.images, strict=True):
            yield f"{self.study.key}.{view.member}", image


@dataclass(frozen=True)
class _Image:
    """An image that can be stored; `view.member` is its suffix until it is known which images are kept."""

    source: SourceView
    view: View
    data: bytes
    volume: bool

    @property
    def raw(self) -> bool:
        return self.view.presentation_intent == RAW

    @property
    def place(self) -> tuple[str, str, bool]:
        """A slab of tomosynthesis is not the presentation of a plain image of its view."""
        return self.view.laterality, self.view.view, self.volume


def build_sample(config: SampleConfig, study: SourceStudy) -> Sample:
    """Read, crop and encode every image of a study. A bad image is refused; it never stops a build."""
    images: list[_Image] = []
    refusals: list[Refusal] = []
    seen: set[str | None] = {None}
    for source in study.views:
        try:
            _check_study(study)
            with quiet():
                image = _build_image(config, source)
            if image.view.instance in seen - {None}:
                raise Refused("duplicate", "the study has another file of the same SOP Instance UID")
        except Exception as error:  # untrusted input: whatever a parser or decoder trips over is told, not raised
            if isinstance(error, OSError) and is_of_the_machine(error):
                raise  # the image is not to blame, and the build continues when it is started again
            refusals.append(refusal(config.root, source, error))
            continue
        seen.add(image.view.instance)
        images.append(image)
    images, others = _choose_intent(images, config.intent)
    refusals += [refusal(config.root, image.source, error) for image, error in others]
    sample = Study(
        key=study_key(config.key, config.source, study),
        patient=keyed_hash(config.key, "patient", config.source, study.patient_id),
        source=config.source,
        split=split_of(config.source, study.patient_id),
        views=tuple(replace(image.view, member=f"{n}.{image.view.member}") for n, image in enumerate(images)),
        age=study.age,
        race=study.race,
        ethnicity=study.ethnicity,
        reason=study.reason,
    )
    return Sample(sample, tuple(image.data for image in images), tuple(refusals))


def study_key(key: bytes, source: str, study: SourceStudy) -> str:
    return keyed_hash(key, "study", source, study.patient_id, study.study_id)


def refusal(root: Path, source: SourceView, error: Exception) -> Refusal:
    """The line about an image that is left out."""
    reason = error.reason if isinstance(error, Refused) else "unreadable"
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, Refused | OSError):
        message = f"its header or pixels are damaged in a way that was not foreseen ({message})"
    file = str(source.path.relative_to(root)) if source.path.is_relative_to(root) else source.path.name
    return Refusal(legible(file), reason, legible(message))


def _choose_intent(images: Sequence[_Image], intent: str) -> tuple[list[_Image], list[tuple[_Image, Refused]]]:
    """The images without those of the other intent, where a view of the study has both; what is not raw is shown.

    Only images that can be stored count: a raw one is kept where the presentation image is damaged.
    """
    kinds: dict[tuple[str, str, bool], set[bool]] = defaultdict(set)
    for image in images:
        kinds[image.place].add(image.raw)
    kept, others = [], []
    for image in images:
        if intent == "both" or image.raw == (intent == "processing") or len(kinds[image.place]) == 1:
            kept.append(image)
            continue
        told = "is raw (FOR PROCESSING)" if image.raw else "is for presentation"
        message = f"the image {told}, and its view has another; pack.intent={intent} keeps that one"
        others.append((image, Refused("other-intent", message)))
    return kept, others


def _build_image(config: SampleConfig, source: SourceView) -> _Image:
    if source.refused:
        raise Refused(*source.refused)
    _check_path(source.path, config.root)
    _check_text("report", source.report, LONGEST_REPORT, allowed="\n\t")
    picture = read_picture(source.path, config.picture, source.laterality)
    header = picture.header if picture.header is not None else Dataset()
    laterality, position, conflicts = _side_and_view(source, header)
    if any(finding.box and _is_outside(finding.box, picture.original_size) for finding in source.findings):
        conflicts += ("box",)
    instance = header.get("SOPInstanceUID")
    view = View(
        member="jpg" if config.quality else "png",
        laterality=laterality,
        view=position,
        size=picture.geometry.size,
        original_size=picture.original_size,
        pixel_spacing=find_spacing(header),
        crop=picture.geometry.original_crop(picture.original_size),
        flipped=picture.geometry.flipped,
        to_original=picture.geometry.to_original,
        labels=source.labels,
        findings=tuple(_to_stored(finding, picture.geometry) for finding in source.findings),
        report=source.report,
        presentation_intent=find_intent(header),
        vendor=None if picture.header is None else find_vendor(header),
        instance=keyed_hash(config.key, "instance", str(instance)) if instance else None,
        processed=picture.processed,
        conflicts=conflicts,
        fallbacks=picture.fallbacks,
    )
    return _Image(source, view, _encode(picture, config.quality), is_volume(header))


def _side_and_view(source: SourceView, header: Dataset) -> tuple[str, str, tuple[str, ...]]:
    """Laterality, view, and which of them table and header tell differently.

    The table wins: it was checked by people, headers often were not.
    """
    conflicts = []
    told: dict[str, str] = {}
    for name, of_table, find in (
        ("laterality", source.laterality, find_laterality),
        ("view", source.view, find_view),
    ):
        try:
            of_header = find(header)
        except Refused:
            if of_table is None:
                raise
            of_header = "several"
        if of_table and of_header and of_table != of_header:
            conflicts.append(name)
        told[name] = of_table or of_header or ""
    if told["laterality"] not in LATERALITIES:
        raise Refused("laterality", "neither the table nor the header says whether this is the left or right breast")
    if not told["view"]:
        raise Refused("view", f"neither the table nor the header says that this is one of {', '.join(VIEWS)}")
    if told["view"] not in VIEWS:
        reason = "spot" if told["view"] == "spot" else "other-view"
        raise Refused(reason, f"the view is {told['view'][:40]!r}, not one of {', '.join(VIEWS)}")
    return told["laterality"], told["view"], tuple(conflicts)


def _encode(picture: Picture, quality: int | None) -> bytes:
    suffix, options = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]) if quality else (".png", [])
    pixels: NDArray[Any] = picture.pixels
    ok, data = cv2.imencode(suffix, pixels, options)
    if not ok:
        raise Refused("encode", f"an image of {picture.geometry.size} could not be written as {suffix}")
    return data.tobytes()


def _is_outside(box: Box, size: tuple[int, int]) -> bool:
    """Whether no part of a box lies in the original image of (height, width) `size`."""
    x0, y0, x1, y1 = box
    return x1 <= 0 or y1 <= 0 or x0 >= size[1] or y0 >= size[0]


def _to_stored(finding: Finding, geometry: Geometry) -> Finding:
    return replace(finding, box=geometry.box_to_stored(finding.box)) if finding.box else finding


def _check_path(path: Path, root: Path) -> None:
    """A table's cell must not lead out of the archive. Links inside of it are the archive's own business."""
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(root)):
        raise Refused("outside", "the path leads out of the archive's root")


def with_plain_texts(study: SourceStudy) -> SourceStudy:
    """The same texts, however the table spelled them: one character ends a line, and facts are of one line."""
    texts = {name: _plain(getattr(study, name)) for name in FACTS}
    facts: dict[str, Any] = {name: text and " ".join(re.split("[\n\t]+", text)) for name, text in texts.items()}
    return replace(study, views=tuple(replace(view, report=_plain(view.report)) for view in study.views), **facts)


def _plain(text: str | None) -> str | None:
    """With "\\n" for any end of a line, blanks for no-break spaces, and without byte order marks."""
    plain = text and LINE_END.sub("\n", text).replace("\xa0", " ").replace("\ufeff", "")
    return text if plain == text else plain


def _check_study(study: SourceStudy) -> None:
    for name in FACTS:
        _check_text(name, getattr(study, name), LONGEST_FACT)
    if study.age is not None and not 0 <= study.age <= 130:
        raise Refused("hostile", f"age: {study.age} is no age in years")


def _check_text(name: str, text: str | None, longest: int, allowed: str = "") -> None:
    if text is None:
        return
    if len(text) > longest:
        raise Refused("hostile", f"{name}: {len(text)} characters, at most {longest} are stored")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in allowed for letter in text):
        raise Refused("hostile", f"{name}: holds control characters")
