"""Settings that have nothing to work on in the shards of a run.

They are no mistake: the recipe may be meant for other shards. But the run would be another one than its settings say,
without a word, so that it begins with a line for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mama.data import report_text
from mama.data.images import is_remote
from mama.data.pairs import Pairs
from mama.errors import ConfigError
from mama.settings.schema import Config
from shards.errors import FetchError, ShardError
from shards.schema import View

FIRST = 64  # pairs of the run that are looked at where its shards are not on this machine
STUDIES = 5_000  # that are looked at where they are: all ranks wait for it, and each takes two reads of a file


@dataclass(frozen=True)
class Looked:
    """Views of a study: those that are anchors, and all, as each may be a partner and have a text of its own."""

    anchors: list[View]
    views: tuple[View, ...]


@dataclass(frozen=True)
class Setting:
    """A setting, whether it works on anything in a study, and what is said where it never does."""

    name: str
    value: str
    works_on: Callable[[Looked], bool]
    lacking: str  # begins behind "none of the ... images"
    follows: str
    fix: str


def _tells_findings(looked: Looked) -> bool:
    return any(report_text.findings(view) for view in looked.anchors)


def _has_boxes(looked: Looked) -> bool:
    """Boxes beside a radiologist's own words change nothing (`mama.data.seen_findings`)."""
    return any(one.box for view in looked.views if not report_text.own_words(view) for one in view.findings)


SENTENCES = Setting(
    name="loss.local_sentences",
    value="findings",
    works_on=_tells_findings,
    lacking="has a text that tells findings",
    follows="the local term is 0",
    fix="choose all, or shards with findings, BI-RADS or reports",
)
CROP = Setting(
    name="data.findings",
    value="crop",
    works_on=_has_boxes,
    lacking="has a box of a finding that the text describes",
    follows="texts are those of data.findings=image",
    fix="choose image, or shards with boxes",
)


def idle_settings(config: Config, fetch: bool) -> list[str]:
    """A line for each setting that has nothing to work on; also where that cannot be known.

    All images that the run can draw, of at most `STUDIES`, are looked at until one has what a setting works on: two
    small reads a study. What `data.max_tokens` cuts off counts, and so does every view that may be a partner.
    Where shards are at URLs it is the first pairs of the run alone, whose shards are downloaded; without `fetch` none.
    """
    asked = [SENTENCES] if config.loss.local and config.loss.local_sentences == "findings" else []
    asked += [CROP] if config.data.findings == "crop" else []
    remote = is_remote(config.data)
    if not asked or (remote and not fetch):
        return [f"{_named(one)}: unknown whether the shards have what it works on: they are not here" for one in asked]
    try:
        pairs = Pairs(config)
        looks = _first(pairs) if remote else _all(pairs)
        for looked in islice(looks, STUDIES):
            asked = [one for one in asked if not one.works_on(looked)]
            if not asked:
                return []
        more = next(looks, None) is not None
    except (ConfigError, ShardError, OSError) as error:  # training meets it too, on all ranks
        return [f"{_named(one)}: unknown whether the shards have what it works on ({error})" for one in asked]
    if remote:
        among, where = f"anchor images of the run's first {FIRST} pairs", "where this holds for all images, "
    elif more:
        among, where = f"images of the first {STUDIES:,} studies that the run draws", "where this holds for all, "
    else:
        among, where = f"{np.count_nonzero(pairs.drawable):,} images that the run draws", ""
    return [f"{_named(one)}, but none of the {among} {one.lacking}: {where}{one.follows}; {one.fix}" for one in asked]


def _named(one: Setting) -> str:
    return f"{one.name}: {one.value}"


def _all(pairs: Pairs) -> Iterator[Looked]:
    """Of each study of which the run can draw an image."""
    images, drawable = pairs.images, pairs.drawable
    for number, end in enumerate(images.ends):
        own = drawable[images.ends[number - 1] if number else 0 : end]
        if own.any():
            yield from _study(pairs, number, np.flatnonzero(own).tolist())


def _first(pairs: Pairs) -> Iterator[Looked]:
    """Of the study of each of the first pairs."""
    for index in range(FIRST):
        number, anchor = pairs.images.locate(pairs.image(index))
        yield from _study(pairs, number, [anchor])


def _study(pairs: Pairs, number: int, anchors: list[int]) -> Iterator[Looked]:
    """Nothing if it is unreadable, as no pair is made of it."""
    try:
        views = pairs.images.study(number).views
    except FetchError:
        raise
    except ShardError:
        return
    yield Looked([views[anchor] for anchor in anchors], views)
