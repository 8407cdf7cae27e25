"""Images with their embeddings -> exams with scores: what `mama predict` reports of them.

Letters: n images, s sentences, K classes, D shared width, d width of the image tower.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from mama.evaluate.arrays import Float32s, Float64s
from mama.evaluate.tasks import Unit
from mama.evaluate.units import Pool
from mama.predict.document import BreastScores, ExamScores, ImageScores, MapFacts, Probabilities
from mama.predict.pictures import Pictured
from mama.predict.scores import ScoredTask, pooled
from shards.files import legible
from shards.pack.sample import Refusal

Both = tuple[Probabilities, Probabilities]  # as they are, and calibrated


@dataclass(frozen=True)
class Embedded:
    """An image without its pixels, as the model sees it: unit embedding [D] and global feature of the tower [d]."""

    image: Pictured
    embedding: Float32s
    tower: Float32s
    similarity: dict[str, float] = field(default_factory=dict)  # sentence -> cosine
    maps: dict[str, MapFacts] = field(default_factory=dict)

    @property
    def exam(self) -> Hashable:
        """What its exam is known by: patient and study; without a study it is one by itself."""
        return (self.image.patient, self.image.exam) if self.image.exam else self.image.file

    @property
    def place(self) -> tuple[Hashable, str | None, str | None]:
        """Exam, side and view."""
        return self.exam, self.image.laterality, self.image.view


def without_other_intents(images: Sequence[Embedded], intent: str) -> tuple[list[Embedded], list[Refusal]]:
    """(scored, refused): of a view with raw images and others, only those of the `intent` that packing kept."""
    kinds: dict[Hashable, set[bool]] = defaultdict(set)
    for one in images:
        kinds[one.place].add(one.image.raw)
    kept: list[Embedded] = []
    refused: list[Refusal] = []
    for one in images:
        alone = None in one.place or len(kinds[one.place]) == 1
        if intent == "both" or alone or one.image.in_shards or one.image.raw == (intent == "processing"):
            kept.append(one)
            continue
        which, other = ("raw (FOR PROCESSING)", "for presentation") if one.image.raw else ("for presentation", "raw")
        message = f"the image is {which}, and its view has one {other}, as the model was trained on"
        refused.append(Refusal(legible(one.image.file), "other-intent", message))
    return kept, refused


def with_implants_of_breasts(images: Sequence[Embedded]) -> list[Embedded]:
    """The images, with an implant that another image of the same breast shows (`shards.pack.implants`)."""
    breasts = {(one.exam, one.image.laterality) for one in images if one.image.facts.implant and one.image.laterality}
    found = []
    for one in images:
        if (one.exam, one.image.laterality) in breasts:
            facts = replace(one.image.facts, implant=True)
            study = replace(one.image.study, views=(facts,))
            one = replace(one, image=replace(one.image, facts=facts, study=study))
        found.append(one)
    return found


def exams_of(
    images: Sequence[Embedded], tasks: Sequence[ScoredTask], probabilities: Sequence[Float64s], pool: Pool
) -> list[ExamScores]:
    """The exams that images make up, in the order of their first images.

    `probabilities` are, for each task, those [n, K] of the images.
    """
    places: dict[Unit, list[Hashable]] = {
        "image": list(range(len(images))),
        "breast": [(one.exam, one.image.laterality) for one in images],
        "exam": [one.exam for one in images],
    }
    scores = {kind: _of_units(kind, keys, images, tasks, probabilities, pool) for kind, keys in places.items()}
    members: dict[Hashable, list[int]] = defaultdict(list)
    for row, one in enumerate(images):
        members[one.exam].append(row)
    patients = Counter(images[rows[0]].image.exam for rows in members.values())
    return [_exam(exam, rows, images, scores, patients) for exam, rows in members.items()]


def _exam(
    exam: Hashable,
    rows: list[int],
    images: Sequence[Embedded],
    scores: dict[Unit, dict[Hashable, Both]],
    patients: Counter[str | None],
) -> ExamScores:
    first = images[rows[0]].image
    own = [images[row] for row in rows]
    sides = sorted({one.image.laterality for one in own if one.image.laterality})
    of_exam = scores["exam"].get(exam, ({}, {}))
    of_sides = {side: scores["breast"].get((exam, side), ({}, {})) for side in sides}
    shared = first.exam is not None and patients[first.exam] > 1
    return ExamScores(
        exam=legible(first.exam or first.file),
        patient=first.patient and legible(first.patient),
        scores=of_exam[0],
        calibrated=of_exam[1],
        breasts=[BreastScores(laterality=side, scores=b[0], calibrated=b[1]) for side, b in of_sides.items()],
        images=[
            _image(images[row], scores["image"].get(row, ({}, {})), _notes(images[row], own, shared)) for row in rows
        ],
    )


def _image(one: Embedded, both: Both, notes: list[str]) -> ImageScores:
    found = ImageScores(
        file=legible(one.image.file),
        laterality=one.image.laterality,
        view=one.image.view,
        original_size=list(one.image.facts.original_size),
        scores=both[0],
        calibrated=both[1],
        similarity=one.similarity,
        notes=notes,
    )
    if one.maps:
        found["maps"] = one.maps
    return found


def _notes(one: Embedded, own: Sequence[Embedded], shared: bool) -> list[str]:
    """What a reader of the scores has to know of an image; `own` are those of its exam."""
    image, notes = one.image, list(one.image.notes)
    if not image.exam:
        notes.append("no study is known: the image is an exam by itself")
    if not image.laterality:
        notes.append("its side is not known: it counts in no breast")
    if not image.view:
        notes.append("its view is not known")
    same = sum(other.place == one.place for other in own)
    if same > 1 and image.laterality and image.view:
        notes.append(f"the exam has {same} images of {image.laterality}-{image.view}: each of them counts")
    if shared:
        notes.append("another patient has an exam of this study UID: they are two exams")
    return notes


def _of_units(
    kind: Unit,
    keys: Sequence[Hashable],
    images: Sequence[Embedded],
    tasks: Sequence[ScoredTask],
    probabilities: Sequence[Float64s],
    pool: Pool,
) -> dict[Hashable, Both]:
    """The scores of each unit that `keys` name, of those images that a task is about."""
    found: dict[Hashable, Both] = defaultdict(lambda: ({}, {}))
    for one, of_images in zip(tasks, probabilities, strict=True):
        rows = [row for row, image in enumerate(images) if one.task.admits(image.image.study, image.image.facts)]
        if not rows:
            continue
        own = [keys[row] for row in rows]
        of_units = pooled(kind, own, of_images[rows], pool, one.task.binary)
        _put(found, 0, one, list(dict.fromkeys(own)), of_units)
        if kind in one.recalibrate:
            _put(found, 1, one, list(dict.fromkeys(own)), one.recalibrate[kind](of_units))
    return found


def _put(found: dict[Hashable, Both], which: int, one: ScoredTask, keys: Sequence[Hashable], scores: Float64s) -> None:
    for key, row in zip(keys, scores.tolist(), strict=True):
        found[key][which][one.task.name] = dict(zip(one.classes, row, strict=True))
