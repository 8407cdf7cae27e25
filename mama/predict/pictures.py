"""An image of the user -> what the model sees: the picture code of packing and the canvas, in worker processes.

It imports neither torch nor pandas, as every worker imports it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset

from mama.data.images import to_canvas
from mama.predict.seen import Seen
from mama.settings.schema import Fit
from shards.errors import FetchError, Refused, ShardError, is_machine_error
from shards.files import legible
from shards.image.dicom_file import find_file, is_dicom, open_unfolded, read_dicom
from shards.image.header import find_implant, find_intent, find_laterality, find_vendor
from shards.image.other_formats import no_pixel_limit
from shards.image.picture import PictureConfig
from shards.pack.sample import Refusal, refusal
from shards.pack.stored_image import stored_image
from shards.pack.workers import CRASH, map_in_order
from shards.processes import quiet
from shards.read.reader import ShardReader
from shards.read.tar import decode_image, to_uint8
from shards.schema import CONFLICTS, FALLBACKS, RAW, Labels, SourceView, Study, View

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of a file
OPEN_SHARDS = 8  # folders of shards that a worker keeps open
RAW_MESSAGE = "a raw image (FOR PROCESSING); --for-processing (in Python for_processing=True) scores it, rendered"
VOLUME = ": tomosynthesis, which this model was not trained on"


@dataclass(frozen=True)
class ImageFile:
    """An image file; what a table says of it wins over its header. `refused`: why it is not read."""

    file: str  # as it was given
    path: Path
    patient: str | None = None
    study: str | None = None
    laterality: str | None = None
    view: str | None = None
    refused: tuple[str, str] | None = None


@dataclass(frozen=True)
class ShardImage:
    """View `position` of study `number` in the shards at `folder`, of one split or (None) of all."""

    file: str  # <folder>/<study key>/<number of the view>
    folder: str
    split: str | None
    cache: Path
    number: int
    position: int


Input = ImageFile | ShardImage


@dataclass(frozen=True)
class Recipe:
    """How a picture is made: as the training images were, `preprocessing.json` of the model folder.

    Raw images are refused unless `raw`.
    """

    picture: PictureConfig
    quality: int | None
    size: tuple[int, int]  # of the canvas [H, W]
    fit: Fit
    raw: bool = False


@dataclass(frozen=True)
class Pictured:
    """An image that can be scored. `data` is the stored picture as JPEG or PNG, which has been decoded for `canvas`.

    `study` has the facts of this image alone, `study.views[0]`; of a file those of its header.
    """

    file: str
    exam: str | None  # study UID or key; None: none is stated
    patient: str | None
    laterality: str | None
    view: str | None
    data: bytes
    canvas: NDArray[np.uint8]
    facts: View
    study: Study
    in_shards: bool = False
    instance: str | None = None  # SOP Instance UID, or its keyed hash in shards
    raw: bool = False
    notes: tuple[str, ...] = field(default=())

    def seen(self) -> Seen:
        """The image with its decoded pixels."""
        return Seen(
            patient=self.patient,
            laterality=self.laterality,
            view=self.view,
            stored=to_uint8(decode_image(self.data)),
            canvas=self.canvas,
            original_size=self.facts.original_size,
            to_original=self.facts.to_original,
            flipped=self.facts.flipped,
        )


def pictures(recipe: Recipe, inputs: Iterable[Input], workers: int) -> Generator[Pictured | Refusal, None, None]:
    """The picture of each input in order, or why there is none; in `workers` processes, 0: in this process.

    Raises `OSError` and `FetchError` for an error of the machine.
    """
    return map_in_order(partial(picture_of, recipe), inputs, workers, _crashed)


def picture_of(recipe: Recipe, given: Input) -> Pictured | Refusal:
    """The picture of one input, or why there is none."""
    if isinstance(given, ShardImage):
        return _of_shards(recipe, given)
    try:
        if given.refused:
            raise Refused(*given.refused)
        with quiet():
            if not recipe.raw:
                _refuse_raw(given.path)
            return _of_file(recipe, given)
    except Exception as error:  # untrusted input: a parser or decoder may raise anything
        if isinstance(error, OSError) and is_machine_error(error):
            raise
        found = refusal(given.path.parent, SourceView(given.path), error)
        if found.reason == "tomosynthesis":
            found = replace(found, message=found.message.partition(";")[0] + VOLUME)
        return replace(found, file=legible(given.file))


def _crashed(given: Input) -> Refusal:
    reason, message = CRASH
    return Refusal(legible(given.file), reason, message.replace("an image of this study", "it"))


def _refuse_raw(path: Path) -> None:
    """Raise `Refused` ("for-processing") for a raw image, before its pixels are decoded."""
    path = find_file(path)
    if not path.is_file():
        return  # `read_picture` has the reason
    with open_unfolded(path) as file:
        if is_dicom(file) and find_intent(read_dicom(file, stop_before_pixels=True)) == RAW:
            raise Refused("for-processing", RAW_MESSAGE)


def _of_file(recipe: Recipe, given: ImageFile) -> Pictured:
    stored = stored_image(given.path, recipe.picture, recipe.quality, given.laterality, given.view, must_know=False)
    picture, header = stored.picture, stored.header
    patient = given.patient or _text(header, "PatientID")
    study = given.study or _text(header, "StudyInstanceUID")
    facts = View(
        member="jpg" if recipe.quality else "png",
        laterality=stored.laterality or "",
        view=stored.view or "",
        size=picture.geometry.size,
        original_size=picture.original_size,
        pixel_spacing=None,
        crop=picture.geometry.original_crop(picture.original_size),
        flipped=picture.geometry.flipped,
        to_original=picture.geometry.to_original,
        labels=Labels(),
        vendor=None if picture.header is None else find_vendor(header),
        presentation_intent=find_intent(header),
        processed=picture.processed,
        implant=find_implant(header),
    )
    notes = [CONFLICTS[word] for word in stored.conflicts]
    if patient and not study:
        notes.append("no study is known: all such images of the patient are one exam")
    if stored.laterality and not given.laterality and not _states_side(header):
        notes.append("its side is known from PatientOrientation alone, which is wrong of a picture that was turned")
    if (pages := _pages(given.path)) > 1:
        notes.append(f"the first of the {pages} pages of its TIFF file: the others are not read")
    notes += [f"rendered by {FALLBACKS[word]}" for word in picture.fallbacks]
    if facts.presentation_intent == RAW:
        notes.append("a raw image (FOR PROCESSING), " + ("rendered for display" if picture.processed else "as it is"))
    return Pictured(
        file=given.file,
        exam=study or patient,
        patient=patient,
        laterality=stored.laterality,
        view=stored.view,
        data=stored.data,
        canvas=_canvas(stored.data, recipe),
        facts=facts,
        study=Study(study or patient or given.file, patient or "", "", "", (facts,)),
        instance=_text(header, "SOPInstanceUID"),
        raw=facts.presentation_intent == RAW,
        notes=tuple(notes),
    )


def _states_side(header: Dataset) -> bool:
    """Whether a header that tells the side does so in words, not only by the direction of its columns."""
    words = Dataset(header)
    if "PatientOrientation" in words:
        del words.PatientOrientation
    return find_laterality(words) is not None


def _pages(path: Path) -> int:
    """The number of pictures in a TIFF file; 1 of any other, and of those that Pillow cannot read."""
    with open_unfolded(find_file(path)) as file, no_pixel_limit(), suppress(Exception):
        if file.read(4) in TIFF:
            file.seek(0)
            with Image.open(file, formats=["TIFF"]) as image:
                return int(getattr(image, "n_frames", 1))
    return 1


def _of_shards(recipe: Recipe, given: ShardImage) -> Pictured | Refusal:
    """Raises `FetchError` for an error of machine or network."""
    reader = _reader(given.folder, given.split, given.cache)
    try:
        study = reader.study(given.number)
        view = study.views[given.position]
        data = reader.encoded(given.number, given.position)
        canvas = _canvas(data, recipe)
    except FetchError:
        raise
    except ShardError as error:
        return Refusal(legible(given.file), "unreadable", legible(str(error)))
    return Pictured(
        file=f"{given.folder}/{study.key}/{view.member}",
        exam=study.key,
        patient=study.patient,
        laterality=view.laterality,
        view=view.view,
        data=data,
        canvas=canvas,
        facts=view,
        study=replace(study, views=(view,)),
        in_shards=True,
        instance=view.instance,
        raw=view.presentation_intent == RAW,
    )


@lru_cache(OPEN_SHARDS)
def _reader(folder: str, split: str | None, cache: Path) -> ShardReader:
    return ShardReader(folder, split, cache)


def _canvas(data: bytes, recipe: Recipe) -> NDArray[np.uint8]:
    return to_canvas(to_uint8(decode_image(data)), recipe.size, recipe.fit)


def _text(header: Dataset, name: str) -> str | None:
    return str(header.get(name) or "").strip() or None
