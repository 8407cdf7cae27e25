"""What a model folder says of the data that it was trained on: how its images are made, its texts, its patients."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from mama.data.images import Images
from mama.export.preprocessing import write_preprocessing
from mama.export.trained_on import write_trained_on
from mama.export.training_texts import TextsOf, write_training_texts
from mama.settings.schema import Config
from shards.errors import FetchError, ShardError
from shards.progress import progress
from shards.schema import Study

log = logging.getLogger(__name__)


def write_training_data(config: Config, folder: Path) -> None:
    """Write preprocessing.json, texts.json and trained_on.safetensors of what a run of `config` trains on.

    Reads each study once. Raises `ShardError` if shards cannot be read.
    """
    write_preprocessing(config, folder)
    images, texts = Images(config.data, "train"), TextsOf(config.data)
    instances: set[str] = set()
    for study in _studies(images):
        texts.add(study)
        instances |= {view.instance for view in study.views if view.instance}
    write_trained_on(images, instances, folder)
    write_training_texts(texts.found(), folder)


def _studies(images: Images) -> Iterator[Study]:
    """Those that can be read."""
    numbers = range(len(images.studies))
    for number in progress(numbers, len(numbers), "studies that it was trained on", "studies"):
        try:
            yield images.study(number)
        except FetchError:
            raise
        except ShardError as error:
            log.warning("%s: its images and texts are not recorded as trained on: %s", images.key(number), error)
