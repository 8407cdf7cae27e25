"""One study of a source -> one sample of a shard. This is the part of packing that runs in every worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2

from shards.crop import Geometry, prepare
from shards.dicom import read_image
from shards.identity import keyed_hash, split_of
from shards.schema import VIEWS, Finding, Refused, SourceStudy, SourceView, Study, View


@dataclass(frozen=True)
class SampleConfig:
    """What `build_sample` needs to know besides the study."""

    source: str
    root: Path
    key: bytes
    long_side: int
    quality: int
    crop: bool


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


def build_sample(config: SampleConfig, study: SourceStudy) -> Sample:
    """Read, crop and encode every image of a study. A bad image is refused; it never stops a build."""
    views: list[View] = []
    images: list[bytes] = []
    refusals: list[Refusal] = []
    for source_view in study.views:
        try:
            view, image = _build_view(config, source_view, f"{len(views)}.jpg")
        except Exception as error:  # untrusted input: whatever a parser or decoder trips over is told, not raised
            reason = error.reason if isinstance(error, Refused) else "unreadable"
            message = " ".join(str(error).split()) or type(error).__name__
            refusals.append(Refusal(_relative(source_view.path, config.root), reason, message))
            continue
        views.append(view)
        images.append(image)
    sample = Study(
        key=keyed_hash(config.key, "study", config.source, study.patient_id, study.study_id),
        patient=keyed_hash(config.key, "patient", config.source, study.patient_id),
        source=config.source,
        split=split_of(config.source, study.patient_id),
        views=tuple(views),
        age=study.age,
        race=study.race,
        ethnicity=study.ethnicity,
        reason=study.reason,
    )
    return Sample(sample, tuple(images), tuple(refusals))


def _build_view(config: SampleConfig, source: SourceView, member: str) -> tuple[View, bytes]:
    pixels = read_image(source.path)
    laterality = source.laterality or pixels.laterality  # the table was checked by people, headers often were not
    position = source.view or pixels.view
    if laterality is None:
        raise Refused("laterality", "neither the table nor the header says whether this is the left or right breast")
    if position not in VIEWS:
        raise Refused("view", f"neither the table nor the header says that this is one of {', '.join(VIEWS)}")
    image, geometry = prepare(pixels.array, config.long_side, config.crop)
    height, width = pixels.array.shape
    view = View(
        member=member,
        laterality=laterality,
        view=position,
        size=geometry.size,
        original_size=(height, width),
        pixel_spacing=pixels.spacing,
        crop=geometry.crop,
        flipped=geometry.flipped,
        to_original=geometry.to_original,
        labels=source.labels,
        findings=tuple(_to_stored(finding, geometry) for finding in source.findings),
        report=source.report,
        presentation_intent=pixels.intent,
    )
    ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, config.quality])
    if not ok:
        raise Refused("encode", f"an image of {geometry.size} could not be written as JPEG")
    return view, data.tobytes()


def _to_stored(finding: Finding, geometry: Geometry) -> Finding:
    return replace(finding, box=geometry.box_to_stored(finding.box)) if finding.box else finding


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name
