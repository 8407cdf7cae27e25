"""The pages of a prediction: `exam-<n>.html` for each exam, and `index.html`; each is one file that needs no network.

An exam hangs as a radiologist hangs it, with the map of a sentence over the pictures, its scores and its neighbours.
The pages show what predictions.json has, and compute no figure of their own. A policy of their own (CSP) allows their
style and script by hash, and nothing else; without the script pictures and scores are there all the same.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from mama.export.figures import Metrics
from mama.predict.document import Document, ExamScores, ImageScores, Probabilities
from mama.predict.shown import Shown, overlay
from shards.files import atomic_write
from shards.pages import page_template

TEMPLATES = Path(__file__).parent / "templates"
SIDES = {"R": "Right", "L": "Left"}
VIEWS = ("CC", "MLO")
HEIGHT = 600  # pixels of a picture on the page at most
SIMILAR = 1.5  # least ratio of the long sides of files that are not of one kind of machine


@dataclass(frozen=True)
class _Map:
    sentence: int
    overlay: str
    box: tuple[float, float, float, float] | None  # (x, y, width, height) in the picture, of `Shown.extent`
    peak: tuple[float, float] | None


@dataclass(frozen=True)
class _Picture:
    number: int
    image: ImageScores
    shown: Shown | None
    alt: str
    short: str  # its place, as in a table
    file: str  # without all of its folders but the last
    maps: list[_Map]


@dataclass(frozen=True)
class _Sentence:
    number: int
    text: str
    low: float | None
    high: float | None

    @property
    def drawn(self) -> bool:
        """Whether any picture of the exam has its map."""
        return self.low is not None


def write_pages(document: Document, shown: Mapping[str, Shown], folder: Path, metrics: Metrics | None = None) -> None:
    """Write the pages of all exams, then `index.html`, into `folder`.

    `shown` is by the `file` of each image. `metrics` are those of the model folder: what is known about its maps.
    """
    for number, exam in enumerate(document["exams"], start=1):
        atomic_write(folder / f"exam-{number}.html", _exam_page(document, number, exam, shown, metrics).encode())
    atomic_write(folder / "index.html", _index_page(document).encode())


def _exam_page(
    document: Document, number: int, exam: ExamScores, shown: Mapping[str, Shown], metrics: Metrics | None
) -> str:
    sentences = [_sentence(n, text, exam, shown) for n, text in enumerate(document["sentences"])]
    images = sorted(exam["images"], key=_hung)
    names = _names(images)
    pictures = [_picture(n, image, names[n], shown.get(image["file"]), sentences) for n, image in enumerate(images)]
    places = [(view, side) for view in VIEWS for side in SIDES]
    hanging = [
        {
            "title": f"{SIDES[side]} {view}",
            "side": SIDES[side].lower(),
            "pictures": [one for one in pictures if (one.image["view"], one.image["laterality"]) == (view, side)],
        }
        for view, side in places
    ]
    return _page(
        "exam.html.j2",
        document,
        _sizes(pictures),
        script=(TEMPLATES / "exam.js").read_text(),
        exam=exam,
        number=number,
        total=len(document["exams"]),
        sentences=sentences,
        pictures=pictures,
        hanging=hanging if any(cell["pictures"] for cell in hanging) else [],
        others=[one for one in pictures if (one.image["view"], one.image["laterality"]) not in places],
        tables=[_table(document, task, exam, pictures) for task in document["tasks"]],
        neighbours=[one for one in pictures if one.shown and one.shown.neighbours],
        metrics=metrics,
    )


def _index_page(document: Document) -> str:
    rows = [
        {
            "exam": exam["exam"],
            "patient": exam["patient"],
            "images": [
                f"{name} × {count}" if count > 1 else name
                for name, count in Counter(map(_place, sorted(exam["images"], key=_hung))).items()
            ],
            "cells": [_headline(document, task, exam) for task in document["tasks"]],
        }
        for exam in document["exams"]
    ]
    return _page(
        "index.html.j2",
        document,
        "",
        script="",
        rows=rows,
        titles=[_titled(task) for task in document["tasks"].values()],
        images=sum(len(exam["images"]) for exam in document["exams"]),
        refused=document["refused"],
    )


def _page(template: str, document: Document, more_style: str, script: str, **values: Any) -> str:
    style = (TEMPLATES / "pages.css").read_text() + more_style
    allowed = [f"style-src {_hash(style)}", *([f"script-src {_hash(script)}"] if script else [])]
    policy = "; ".join(["default-src 'none'", "img-src data:", *allowed, "base-uri 'none'", "form-action 'none'"])
    common = {"model": document["model"], "notice": document["notice"], "pool": document["pool"]}
    return page_template(TEMPLATES / template).render(**common, style=style, script=script, policy=policy, **values)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _hung(image: ImageScores) -> tuple[int, int]:
    """Its place in the order of reading; those whose view or side is not known come last."""
    view, side = image["view"], image["laterality"]
    return VIEWS.index(view) if view in VIEWS else len(VIEWS), list(SIDES).index(side) if side in SIDES else len(SIDES)


def _place(image: ImageScores) -> str:
    """R CC, L view unknown, side unknown MLO, ..."""
    return f"{image['laterality'] or 'side unknown'} {image['view'] or 'view unknown'}"


def _names(images: Sequence[ImageScores]) -> list[str]:
    """Short names of images, numbered where several have the same place."""
    places = [_place(image) for image in images]
    counts, seen = Counter(places), Counter[str]()
    names = []
    for place in places:
        seen[place] += 1
        names.append(f"{place} {seen[place]}" if counts[place] > 1 else place)
    return names


def _sentence(number: int, text: str, exam: ExamScores, shown: Mapping[str, Shown]) -> _Sentence:
    """One scale for all pictures of the exam, so that they can be compared."""
    low, high = inf, -inf
    for image in exam["images"]:
        one = shown.get(image["file"])
        if one is not None and text in one.maps and text in image.get("maps", {}):
            of_image = image["maps"][text]
            low, high = min(low, of_image["low"]), max(high, of_image["high"])
    return _Sentence(number, text, low, high) if low <= high else _Sentence(number, text, None, None)


def _picture(
    number: int, image: ImageScores, name: str, shown: Shown | None, sentences: Sequence[_Sentence]
) -> _Picture:
    maps = [] if shown is None else list(_maps(image, shown, sentences))
    side = f"{SIDES.get(image['laterality'] or '', 'side unknown')} {image['view'] or 'view unknown'}"
    return _Picture(number, image, shown, f"mammogram, {side}", name, "/".join(image["file"].split("/")[-2:]), maps)


def _maps(image: ImageScores, shown: Shown, sentences: Sequence[_Sentence]) -> Iterator[_Map]:
    for sentence in sentences:
        values, facts = shown.maps.get(sentence.text), image.get("maps", {}).get(sentence.text)
        if values is None or facts is None or sentence.low is None or sentence.high is None:
            continue
        box = peak = None
        if facts["box"] and facts["peak"]:
            (x, y) = facts["peak"]
            box, dot = shown.place(facts["box"]), shown.place((x + 0.5, y + 0.5, x + 0.5, y + 0.5))
            peak = dot[0], dot[1]
        yield _Map(sentence.number, overlay(values, sentence.low, sentence.high), box, peak)


def _sizes(pictures: Sequence[_Picture]) -> str:
    """The style of each picture. Where files are of similar size all have one scale, as large as their cells allow."""
    extents = {one.number: one.shown.extent for one in pictures if one.shown}
    longest = [max(one.image["original_size"]) for one in pictures]
    similar = max(longest) < SIMILAR * min(longest)
    rules = []
    for number, (height, width) in extents.items():
        tall, wide = (max(sides) for sides in zip(*extents.values(), strict=True)) if similar else (height, width)
        most = f"min(100%, {HEIGHT * wide / tall:.1f}px)"
        rules.append(
            f"#p{number} {{ aspect-ratio: {width:.2f} / {height:.2f}; width: calc({most} * {width / wide:.4f}); }}"
        )
    return "\n".join(rules)


def _titled(task: Mapping[str, Any]) -> str:
    return f"{task['title']}: {task['classes'][-1]}" if task["binary"] else str(task["title"])


def _headline(document: Document, task: str, exam: ExamScores) -> str | None:
    """The score of a task's second class of two, else its highest with the name of its class."""
    facts, scores, calibrated = document["tasks"][task], exam["scores"].get(task), exam["calibrated"].get(task)
    if not scores:
        return None
    name = facts["classes"][-1] if facts["binary"] else max(scores, key=lambda one: scores[one])
    adjusted = f" ({calibrated[name]:.3f})" if calibrated else ""
    return f"{'' if facts['binary'] else name + ' '}{scores[name]:.3f}{adjusted}"


def _table(document: Document, task: str, exam: ExamScores, pictures: Sequence[_Picture]) -> dict[str, Any]:
    """The scores of the exam, its breasts and images; of a task of two classes those of the second."""
    facts = document["tasks"][task]
    columns = facts["classes"][-1:] if facts["binary"] else facts["classes"]
    units: list[tuple[str, str, Probabilities, Probabilities]] = [
        ("exam", "Exam", exam["scores"], exam["calibrated"]),
        *(
            ("breast", f"{SIDES[one['laterality']]} breast", one["scores"], one["calibrated"])
            for one in sorted(exam["breasts"], key=lambda one: one["laterality"], reverse=True)
        ),
        *(("image", one.short, one.image["scores"], one.image["calibrated"]) for one in pictures),
    ]
    rows = [
        {
            "kind": kind,
            "name": name,
            "cells": [
                {"raw": raw.get(task, {}).get(column), "calibrated": calibrated.get(task, {}).get(column)}
                for column in columns
            ],
        }
        for kind, name, raw, calibrated in units
    ]
    return {
        "title": facts["title"],
        "columns": columns,
        "rows": rows,
        "calibrated": facts["calibration"],
        "reason": facts["reason"],
        "left_out": facts["left_out"],
        "guessed": [name for name in document["not_taught"].get(task, []) if name not in (facts["left_out"] or ())],
    }
