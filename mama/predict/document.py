"""What a prediction says: `predictions.json`, and the same from Python. Probabilities and cosines are plain numbers."""

from __future__ import annotations

from typing import NotRequired, TypedDict

Probabilities = dict[str, dict[str, float]]  # task -> class -> probability

NOTICE = (
    "Not for clinical use. These are scores of a research model; nothing here is a diagnosis or replaces a radiologist."
)


class ScoringModel(TypedDict):
    """The model that scored: `sha256` is over its weight files, `trained_on` names the archives of its training."""

    name: str
    step: int | None
    sha256: str
    dtype: str
    trained_on: list[str]


class TaskFacts(TypedDict):
    """A task: `calibration` is isotonic or temperature, or None; `left_out` are classes not scored.

    `reason` is why there is none, or which units (images, breasts, exams) have none and why.
    """

    title: str
    classes: list[str]
    binary: bool
    calibration: str | None
    reason: str | None
    left_out: list[str] | None


class MapFacts(TypedDict):
    """A heat map: its PNG, the cosines of its lowest and highest patch (grey 1 and 255), and what stands out in it.

    `peak` (x, y) and `box` (x0, y0, x1, y1) are in pixels of the original file.
    """

    file: str
    low: float
    high: float
    peak: list[int] | None
    box: list[int] | None


class ImageScores(TypedDict):
    """An image: `original_size` is (height, width) in pixels, `similarity` the cosine with each sentence asked for."""

    file: str
    laterality: str | None
    view: str | None
    original_size: list[int]
    scores: Probabilities
    calibrated: Probabilities
    similarity: dict[str, float]
    maps: NotRequired[dict[str, MapFacts]]
    notes: list[str]


class BreastScores(TypedDict):
    """A breast, of its images; there is none for images whose side is not known."""

    laterality: str
    scores: Probabilities
    calibrated: Probabilities


class ExamScores(TypedDict):
    """An exam, of all its images: `exam` is its study UID or key, or the file that is one by itself."""

    exam: str
    patient: str | None
    scores: Probabilities
    calibrated: Probabilities
    breasts: list[BreastScores]
    images: list[ImageScores]


class RefusedFile(TypedDict):
    """An input that was not scored: a code, and a sentence."""

    file: str
    reason: str
    message: str


class Document(TypedDict):
    """All of a prediction. `calibrated` lacks tasks without calibration; a task of some images lacks the others."""

    model: ScoringModel
    notice: str
    pool: str  # mean or max, over the images of a breast or exam
    tasks: dict[str, TaskFacts]
    not_taught: dict[str, list[str]]  # task -> classes that the training texts never mention
    sentences: list[str]
    exams: list[ExamScores]
    refused: list[RefusedFile]
