"""`mama predict`: scores, heat maps and pages of the user's images, in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mama.errors import ConfigError
from mama.evaluate.units import Pool
from mama.predict.document import Document, RefusedFile
from mama.predict.maps import map_files
from mama.predict.model import Model
from mama.predict.results import require_free, results_folder, write_results

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


def predict(request: Request) -> Document:
    """Score the images, and write the folder `request.out`; inputs that were refused are logged one by one.

    Raises `ConfigError` for a mistake, also if no image can be scored, and as `Model.predict`; then nothing is written.
    """
    require_free(request.out)  # before the model is loaded
    model = Model(request.model, base=request.base)
    with results_folder(request.out) as folder:
        draw = map_files(model, model.sentences(request.ask), folder)
        document = model.predict(
            request.inputs,
            request.ask,
            request.tasks or None,
            pool=request.pool,
            for_processing=request.for_processing,
            split=request.split,
            workers=request.workers,
            draw=draw,
        )
        report_refused(document["refused"])
        if not document["exams"]:
            raise ConfigError(f"none of the {len(document['refused'])} images can be scored")
        write_results(document, folder)
    return document


def report_refused(refused: Sequence[RefusedFile]) -> None:
    """Name each input that was refused, with the reason, in a line of its own."""
    for one in refused:
        log.warning("refused: %s: %s: %s", one["file"], one["reason"], one["message"])
