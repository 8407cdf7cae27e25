"""Refuse to evaluate a model on patients that it was trained on, unless that is what the user asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mama.data.held_out import Split
from mama.errors import ConfigError
from mama.evaluate.provenance import Document
from mama.export.trained_on import TRAINED_ON, TrainedOn
from mama.settings.schema import Config
from shards.schema import Study

log = logging.getLogger(__name__)


def check(held_out: Split, shards: Document, trained: TrainedOn | None, config: Config) -> Document | None:
    """How many of the held-out patients and images the model was trained on; None if it does not record that.

    The train split of the very shards that the model was trained on is not looked at: who names it means it. Hashes
    with another key never match. Raises `ConfigError` for known patients or images under `eval.known_patients=refuse`.
    """
    if trained is None:
        log.warning("the model has no %s: whether it was trained on these patients is not checked", TRAINED_ON)
        return None
    of_folder: list[list[Study]] = [[] for _ in held_out.images.readers]
    for item in held_out.items:
        if item.position == 0:
            of_folder[held_out.images.readers.index(held_out.images.studies[item.number][0])].append(item.study)
    patients = images = 0
    told = []
    for address, folder, studies in zip(config.data.shards, shards["folders"], of_folder, strict=True):
        if held_out.name == "train" and folder["train_digest"] in trained.shards:
            continue
        known_patients, known_images = _known(studies, trained)
        patients, images = patients + known_patients, images + known_images
        if known_images:
            those = f"{known_patients} of {len({one.patient for one in studies})} patients"
            those += f" and {known_images} of {sum(len(one.views) for one in studies)} images"
            told.append(f"{those} of the split {held_out.name} of {address}")
    if told and config.eval.known_patients == "refuse":
        raise ConfigError(
            f"eval.known_patients: the model was trained on {'; '.join(told)}; leave these shards "
            "out, name another eval.split, or allow it with eval.known_patients=allow"
        )
    return {"patients": patients, "images": images}


def _known(studies: Sequence[Study], trained: TrainedOn) -> tuple[int, int]:
    """Numbers of patients that the model was trained on, and of images of theirs or that it was trained on itself."""
    patients = trained.patients_among(study.patient for study in studies)
    images = trained.images_among(v.instance for study in studies for v in study.views if v.instance)
    known = [s.patient in patients or v.instance in images for s in studies for v in s.views]
    return len(patients), sum(known)
