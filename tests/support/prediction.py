"""A prediction of invented exams: its document as predictions.json has it, and the pictures of its pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mama.data.images import to_canvas
from mama.predict.document import NOTICE, Document, ExamScores, ImageScores, MapFacts, TaskFacts
from mama.predict.heat_map import marks
from mama.predict.seen import Seen
from mama.predict.shown import Shown, shown
from shards.image.crop import Geometry

ORIGINAL = (300, 200)  # (height, width) of every file
CANVAS = (64, 48)
GRID = (8, 6)
LESION = (60, 120, 90, 150)  # (x0, y0, x1, y1) in a file whose chest wall is at the left
TASKS = {
    "cancer": TaskFacts(title="Cancer", classes=["no cancer", "cancer"], binary=True, calibration="isotonic",
                        reason=None, left_out=None),
    "density": TaskFacts(title="Density", classes=["A", "B", "C", "D"], binary=False, calibration=None,
                         reason="the val split has no such label", left_out=["D"]),
}  # fmt: skip


def original(laterality: str | None) -> np.ndarray:
    """A breast with a white lesion: the chest wall is at the right of a right one, as in most files."""
    rows, columns = np.mgrid[: ORIGINAL[0], : ORIGINAL[1]]
    pixels = np.where((columns / 150) ** 2 + ((rows - 150) / 130) ** 2 < 1, 60, 0).astype(np.uint8)
    x0, y0, x1, y1 = LESION
    pixels[y0:y1, x0:x1] = 255
    return pixels[:, ::-1] if laterality == "R" else pixels


def seen(laterality: str | None, view: str | None, flipped: bool | None = None) -> Seen:
    """Half as large and with the chest wall at the left, as packing stores it, unless told otherwise."""
    flipped = laterality == "R" if flipped is None else flipped
    pixels = original(laterality)[10:290]
    geometry = Geometry((0, 10, 200, 290), flipped, (140, 100))
    stored = pixels.reshape(140, 2, 100, 2).mean((1, 3)).astype(np.uint8)[:, :: -1 if flipped else 1].copy()
    canvas = to_canvas(stored, CANVAS, "letterbox")
    return Seen(None, laterality, view, stored, canvas, ORIGINAL, geometry.to_original, flipped)


def grey_map(one: Seen) -> np.ndarray:
    """A map that finds what is bright: the mean grey of each patch, from 0 to 1."""
    means = one.canvas.reshape(GRID[0], 8, GRID[1], 8).mean((1, 3)) / 255
    return means.astype(np.float32)


def prediction(
    places: Sequence[Sequence[tuple[str | None, str | None]]], sentences: Sequence[str] = (), folder: str = "in"
) -> tuple[Document, dict[str, Shown]]:
    """Exams of images at these (side, view), and what their pages need of the images, by file."""
    pages: dict[str, Shown] = {}
    exams = [_exam(f"exam {number}", of_exam, sentences, folder, pages) for number, of_exam in enumerate(places)]
    document = Document(
        model={
            "name": "invented",
            "step": 7,
            "sha256": "0123456789abcdef" * 4,
            "dtype": "fp32",
            "trained_on": ["CDD-CESM"],
        },
        notice=NOTICE,
        pool="mean",
        tasks=TASKS,
        not_taught={"density": ["C", "D"]},
        sentences=list(sentences),
        exams=exams,
        refused=[],
    )
    return document, pages


def _exam(
    name: str,
    places: Sequence[tuple[str | None, str | None]],
    sentences: Sequence[str],
    folder: str,
    pages: dict[str, Shown],
) -> ExamScores:
    images = []
    for number, (side, view) in enumerate(places):
        file, one = f"{folder}/{name}/{number}.dcm", seen(side, view)
        values = grey_map(one)
        maps = {text: values * (1 - 2 * n) for n, text in enumerate(sentences)}
        facts = {}
        for n, (text, own) in enumerate(maps.items()):
            found = marks(own, one, CANVAS, "letterbox")
            assert found is not None
            facts[text] = MapFacts(
                file=f"maps/{number}-{n}.png",
                low=found.low,
                high=found.high,
                peak=None if found.peak is None else list(found.peak),
                box=None if found.box is None else list(found.box),
            )
        images.append(
            ImageScores(
                file=file,
                laterality=side,
                view=view,
                original_size=list(ORIGINAL),
                scores=_scores(0.1 * (number + 1)),
                calibrated=_calibrated(0.01 * (number + 1)),
                similarity=dict.fromkeys(sentences, 0.125),
                maps=facts,
                notes=[f"note {number}"],
            )
        )
        pages[file] = shown(one, maps, "letterbox")
    return ExamScores(
        exam=name,
        patient="P1",
        scores=_scores(0.9),
        calibrated=_calibrated(0.07),
        breasts=[
            {"laterality": side, "scores": _scores(0.5), "calibrated": _calibrated(0.05)}
            for side in sorted({side for side, _ in places if side})
        ],
        images=images,
    )


def _scores(share: float) -> dict[str, dict[str, float]]:
    return {"cancer": {"no cancer": 1 - share, "cancer": share}, "density": {"A": 0.25, "B": 0.5, "C": 0.25}}


def _calibrated(share: float) -> dict[str, dict[str, float]]:
    return {"cancer": {"no cancer": 1 - share, "cancer": share}}
