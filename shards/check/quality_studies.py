"""The studies on the quality page: a fixed random sample with all images."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from shards.check.contact_sheet import SLOTS, draw_view, finding_line, label_line, people_facts
from shards.read.reader import ShardReader
from shards.schema import Study, View

THUMB = (150, 216)  # width, height in pixels
QUALITY = 75  # of JPEG: about 5 kB a thumbnail
MOST_IMAGES = 24  # of one study


@dataclass(frozen=True)
class Thumb:
    """One image of a study, or the empty place of a missing view (`uri` is None)."""

    name: str
    uri: str | None = None
    labels: str = ""
    findings: str = ""
    report: str = ""


@dataclass(frozen=True)
class Shown:
    """A study on the page."""

    key: str
    facts: str
    thumbs: tuple[Thumb, ...]


def sampled(reader: ShardReader, number: int) -> list[Shown]:
    """`number` random studies (fixed seed) in the order of the shards."""
    drawn = random.Random(0).sample(range(len(reader)), min(number, len(reader)))
    return [_shown(reader, place) for place in sorted(drawn)]


def _shown(reader: ShardReader, place: int) -> Shown:
    study = reader.study(place)
    thumbs = tuple(_thumbs(reader, place, study))
    more = len(study.views) - sum(thumb.uri is not None for thumb in thumbs)
    facts = [study.split, *people_facts(study), *([f"{more} more images"] if more else [])]
    return Shown(study.key, " · ".join(facts), thumbs)


def _thumbs(reader: ShardReader, place: int, study: Study) -> Iterator[Thumb]:
    """The standard views in the standard hanging, then repeated ones."""
    rest = list(range(len(study.views)))
    for side, position in SLOTS:
        found = [n for n in rest if (study.views[n].laterality, study.views[n].view) == (side, position)]
        if found:
            rest.remove(found[0])
            yield _thumb(reader, place, study.views[found[0]], found[0])
        else:
            yield Thumb(f"{side}-{position}")
    for n in rest[: MOST_IMAGES - len(SLOTS)]:
        yield _thumb(reader, place, study.views[n], n)


def _thumb(reader: ShardReader, place: int, view: View, number: int) -> Thumb:
    buffer = io.BytesIO()
    draw_view(reader.image(place, number), view, THUMB).save(buffer, format="jpeg", quality=QUALITY)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumb(f"{view.laterality}-{view.view}", uri, label_line(view), finding_line(view), view.report or "")
