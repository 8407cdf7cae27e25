"""`mama embed`: the embeddings of images in a file, one row an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mama.errors import ConfigError
from mama.predict.document import RefusedFile
from mama.predict.exams import Embedded, without_other_intents
from mama.predict.model import Model
from mama.predict.pictures import Input
from mama.predict.predict import inputs_of, report_refused
from mama.runtime.ending import nothing_written
from shards.files import atomic_file, legible
from shards.pack.sample import Refusal

SUFFIXES = (".npz", ".parquet")
UNKNOWN = -1  # BI-RADS and cancer of an image without this label, in an .npz


@dataclass(frozen=True)
class EmbedRequest:
    """What `mama embed` is asked for; `out` is a file that ends in .npz or .parquet."""

    model: Path
    inputs: tuple[str, ...]
    out: Path
    for_processing: bool = False
    split: str | None = None
    workers: int = 0
    base: str | None = None


@nothing_written()
def embed(request: EmbedRequest) -> list[RefusedFile]:
    """Write the file; returns the inputs that were refused, which are also logged.

    Raises `ConfigError` for a mistake, also if no image can be embedded; then nothing is written.
    So after a signal, which raises `StoppedError`.
    """
    images = check(request)  # before the model is loaded
    model = Model(request.model, base=request.base)
    refused: list[Refusal] = []
    recipe = model.recipe(request.for_processing)
    embedded = list(model.encoder.embedded(images, recipe, request.workers, refused))
    found, others = without_other_intents(embedded, model.preprocessing.intent)
    named = [RefusedFile(file=one.file, reason=one.reason, message=one.message) for one in [*refused, *others]]
    report_refused(named)
    if not found:
        raise ConfigError(f"none of the {len(named)} images can be embedded")
    _write(request.out, table(found), found, model)
    return named


def table(images: Sequence[Embedded]) -> pd.DataFrame:
    """The facts of n images: image (its file), exam, patient, laterality, view; of those in shards split and labels.

    Unknown ones are None. Exam and patient are keyed hashes for an image in shards, else what header or table says.
    """
    return pd.DataFrame([_facts(one) for one in images]).astype({"birads": "Int8", "cancer": "boolean"})


def _facts(one: Embedded) -> dict[str, Any]:
    image, labels = one.image, one.image.facts.labels
    return {
        "image": legible(image.file),
        "exam": legible(image.exam or image.file),
        "patient": image.patient and legible(image.patient),
        "laterality": image.laterality,
        "view": image.view,
        "split": image.study.split or None,
        "birads": labels.birads,
        "density": labels.density,
        "cancer": labels.cancer,
        "pathology": labels.pathology,
    }


def _write(out: Path, facts: pd.DataFrame, images: Sequence[Embedded], model: Model) -> None:
    embeddings, tower = (np.stack([getattr(one, name) for one in images]) for name in ("embedding", "tower"))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(out) as file:
            if out.suffix == ".npz":
                more: dict[str, Any] = {"embeddings": embeddings, "tower": tower}
                np.savez(file, **_columns(facts), **more, model=np.array(model.facts["sha256"]))
            else:
                vectors = {"embedding": list(embeddings), "tower": list(tower)}
                facts.assign(**vectors, model=model.facts["sha256"]).to_parquet(file)
    except BaseException:
        out.with_name(f"{out.name}.part").unlink(missing_ok=True)
        raise


def _columns(facts: pd.DataFrame) -> dict[str, Any]:
    """Texts, "" where unknown, and numbers, `UNKNOWN`: `np.load` reads them without pickle."""
    numbers = {name: facts[name].astype("Int8").fillna(UNKNOWN).to_numpy(np.int8) for name in ("birads", "cancer")}
    texts = {name: facts[name].fillna("").to_numpy(np.str_) for name in facts.columns if name not in numbers}
    return texts | numbers


def check(request: EmbedRequest) -> list[Input]:
    """The images that are asked for. Raises `ConfigError` for a mistake that shows without the model."""
    out = request.out
    if out.name in ("", ".."):
        raise ConfigError(f"--out: {str(out)!r} is no name of a file; name a new one, .npz or .parquet")
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out: {out.name} does not end in {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError("--out: to write Parquet run `pip install 'mama-clip[parquet]'`, or name an .npz file")
    if os.path.lexists(out):
        raise ConfigError(f"--out: {out} exists; name a new file")
    return inputs_of(request.model, request.inputs, request.split)
