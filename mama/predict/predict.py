"""`mama predict`: scores, heat maps and pages of the user's images, in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mama.errors import ConfigError
from mama.evaluate.tasks import load_tasks
from mama.evaluate.units import Pool
from mama.export.figures import Metrics, read_metrics
from mama.export.model_folder import model_folder, read_model
from mama.export.trained_on import read_trained_on
from mama.predict import arguments
from mama.predict.document import Document, RefusedFile
from mama.predict.drawing import Drawing
from mama.predict.exam_page import write_pages
from mama.predict.heat_map import has_maps
from mama.predict.images import find_images
from mama.predict.model import Model
from mama.predict.neighbours import Archive, embed_archive
from mama.predict.pictures import Input
from mama.predict.results import require_free, results_folder, write_results
from mama.runtime.ending import nothing_written
from mama.settings.load import load

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What `mama predict` is asked for: the arguments of `Model.predict`, and its files."""

    model: Path
    inputs: tuple[str, ...]
    out: Path
    tasks: tuple[str, ...] = ()  # none: those that the training texts teach
    ask: tuple[str, ...] = ()
    pool: Pool = "mean"
    for_processing: bool = False
    split: str | None = None
    workers: int = 0
    base: str | None = None
    html: bool = False
    neighbours: str | None = None


@nothing_written()
def predict(request: Request) -> Document:
    """Score the images, and write the folder `request.out`; inputs that were refused are logged one by one.

    Raises `ConfigError` for a mistake, also if no image can be scored, and as `Model.predict`; then nothing is written.
    So after a signal, which raises `StoppedError`.
    """
    images = check(request)  # before the model is loaded
    model = Model(request.model, base=request.base)
    if request.ask and not has_maps(model.model):
        log.info("the model was trained without the local term: there are no heat maps")
    metrics = _metrics(model.folder) if request.html else None
    with results_folder(request.out) as folder:
        canvas, sentences = model.preprocessing.canvas, model.encoder.sentences(request.ask)
        drawing = Drawing(canvas, sentences, folder, request.html, _archive(request, model))
        document = model.scores(
            images,
            request.ask,
            request.tasks or None,
            request.pool,
            request.for_processing,
            request.workers,
            drawing,
        )
        report_refused(document["refused"])
        if not document["exams"]:
            raise ConfigError(f"none of the {len(document['refused'])} images can be scored")
        if request.html:
            write_pages(document, drawing.shown, folder, metrics)
        write_results(document, folder)
    return document


def check(request: Request) -> list[Input]:
    """The images that are asked for. Raises `ConfigError` for a mistake that shows without the model."""
    require_free(request.out)
    if request.neighbours is not None:
        arguments.path("--neighbours", request.neighbours)
    if request.neighbours and not request.html:
        raise ConfigError("--neighbours: they are shown on the pages of exams; add --html")
    if any(not text.strip() for text in request.ask):
        raise ConfigError("--ask: '' is an empty text; write a sentence")
    load_tasks(request.tasks, "--task")
    return inputs_of(request.model, request.inputs, request.split)


def inputs_of(model: Path, inputs: Sequence[str], split: str | None) -> list[Input]:
    """As `find_images`, with the settings of a model. Raises `ConfigError` also without a model."""
    folder = model_folder(model)
    read_model(folder)
    return find_images(inputs, split, load(folder / "config.yaml").data.cache_folder)


def _archive(request: Request, model: Model) -> Archive | None:
    if not request.neighbours:
        return None
    known = read_trained_on(model.folder)
    return embed_archive(model.model, model.config, [request.neighbours], known, model.device)


def _metrics(folder: Path) -> Metrics | None:
    """What the evaluation of the model measured. Without it the pages are whole but for that."""
    try:
        return read_metrics(folder)
    except ConfigError as error:
        log.warning("the pages have no figures of the evaluation: %s", error)
        return None


def report_refused(refused: Sequence[RefusedFile]) -> None:
    """Name each input that was refused, with the reason, in a line of its own."""
    for one in refused:
        log.warning("refused: %s: %s: %s", one["file"], one["reason"], one["message"])
