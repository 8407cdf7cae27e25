"""A trained model in Python: scores of image files, embeddings of images and texts, heat maps. `mama.load` makes it.

Letters: n images, t texts, D shared width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s
from mama.evaluate.units import Pool
from mama.export.licences import terms_of
from mama.export.model_folder import load_model, model_folder, read_model, weights_digest
from mama.export.preprocessing import read_preprocessing
from mama.export.training_texts import read_training_texts
from mama.predict import arguments
from mama.predict.arguments import Paths
from mama.predict.document import NOTICE, Document, RefusedFile, ScoringModel, TaskFacts
from mama.predict.encoder import Draw, Encoder
from mama.predict.exams import Embedded, exams_of, with_implants_of_breasts, without_other_intents
from mama.predict.heat_map import has_maps, to_original
from mama.predict.images import find_images
from mama.predict.pictures import Input, Recipe, ShardImage, pictures
from mama.predict.scores import ScoredTask, require_known_facts, score, scored_tasks
from mama.run.files import named
from mama.run.model_place import require_place
from mama.runtime.collectives import local_device
from mama.settings.load import load
from shards.errors import one_line
from shards.pack.sample import Refusal

log = logging.getLogger(__name__)


class Model:
    """A consolidated model, in evaluation mode, with what its folder says of pictures, texts and calibration."""

    def __init__(self, folder: str | Path, device: str | None = None, base: str | None = None) -> None:
        """Load the model of a run folder, or a model folder.

        `device` is one of PyTorch's names, such as "cpu" or "cuda:1"; without it a GPU, if there is one. `base` is the
        place of the language model that an adapter needs (`mama.export.model_folder.load_model`). Raises `ConfigError`
        if there is no such model, or a file of it is missing, damaged or of an earlier release.
        """
        place = named(Path(os.path.expanduser(arguments.path("folder", folder))))
        require_place(place)
        self.folder = model_folder(place)
        facts = read_model(self.folder)
        self.preprocessing = read_preprocessing(self.folder)
        self.texts = read_training_texts(self.folder)
        self.facts = ScoringModel(
            name=facts.name,
            step=facts.step,
            sha256=weights_digest(self.folder),
            dtype=facts.dtype,
            trained_on=list(dict.fromkeys(terms_of(one.source).title for one in self.preprocessing.sources)),
        )
        self.config = load(self.folder / "config.yaml")
        if base is not None and facts.lora != "adapter":
            raise ConfigError(f"base: {self.folder} holds its own language model; leave base (--base) out")
        base = None if base is None else arguments.path("base", base)
        self.device = local_device() if device is None else _device(device)
        self.model, self.tokenizer = load_model(self.folder, self.device, base)
        self.encoder = Encoder(self.model, self.tokenizer, self.config.data, self.device)

    def predict(
        self,
        inputs: Paths,
        ask: Sequence[str] = (),
        tasks: Sequence[str] | None = None,
        *,
        pool: Pool = "mean",
        for_processing: bool = False,
        split: str | None = None,
        workers: int = 0,
        draw: Draw | None = None,
    ) -> Document:
        """Score image files, folders, CSV tables and shards: what `mama predict` writes to predictions.json.

        `ask` are sentences of your own, of which each image gets the cosine; `tasks` are names of shipped tasks and
        paths of YAML files, None all shipped ones that the training texts teach. `pool` makes the score of a breast or
        an exam of those of its images. `for_processing` renders raw images instead of refusing them. `split` is that of
        shards. `workers` decode beside the model; a script that sets it needs `if __name__ == "__main__":`. `draw` is
        called with each batch of pictures.

        An image that cannot be scored is in `refused`, with the reason, and the rest is scored; if there is no rest,
        `exams` is empty. Raises `ConfigError` for a wrong argument, `ShardError` for a table that cannot be read, and
        `OSError` for an error of the machine.
        """
        images = find_images(inputs, split, self.config.data.cache_folder)
        return self.scores(images, ask, tasks, pool, for_processing, workers, draw)

    def scores(
        self,
        images: Sequence[Input],
        ask: Sequence[str],
        tasks: Sequence[str] | None,
        pool: Pool,
        for_processing: bool,
        workers: int,
        draw: Draw | None,
    ) -> Document:
        """As `predict`, of images that `find_images` found."""
        arguments.require_choices(pool, workers)
        sentences = self.encoder.sentences(ask)
        names = None if tasks is None else arguments.texts("tasks", tasks)
        chosen = scored_tasks(names, self.texts, self.folder, pool)
        if not chosen and not sentences:
            raise ConfigError("the training texts teach no shipped task; name a task or a sentence of your own")
        require_known_facts(chosen, all(isinstance(image, ShardImage) for image in images))
        refused: list[Refusal] = []
        recipe = self.recipe(for_processing)
        found = list(self.encoder.embedded(images, recipe, workers, refused, sentences, draw))
        found, others = without_other_intents(found, self.preprocessing.intent)
        found = with_implants_of_breasts(found)
        return self._document(found, chosen, sentences, [*refused, *others], pool)

    def embed_images(self, paths: Paths) -> Float32s:
        """Unit embeddings, float32 [n, D], of the images at `paths`, which may be folders too, in their order.

        Raises `ConfigError` for the first image that cannot be read, so that no row is missing.
        """
        images = find_images(paths, None, self.config.data.cache_folder)
        refused: list[Refusal] = []
        rows = [one.embedding for one in self.encoder.embedded(images, self.recipe(), 0, refused)]
        for one in refused:
            raise ConfigError(f"{one.file}: {one.reason}: {one.message}")
        return np.stack(rows)

    def embed_texts(self, texts: Sequence[str]) -> Float32s:
        """Unit embeddings, float32 [t, D]; the cosine with an image is their dot product.

        A text ends its sentences with a full stop. Raises `ConfigError` for one that is empty, or too long for the
        model.
        """
        given = arguments.texts("texts", texts)
        split = [self.encoder.split(text, "texts") for text in given]
        if not split:
            raise ConfigError("texts: is empty; give a list of texts")
        return self.encoder.embed_sentences(split)

    def heat_map(self, path: str | Path, sentence: str) -> Float32s:
        """The cosines of a sentence with the patches of an image, float32 [H0, W0] in the pixels of its file.

        Between the centres of patches they are interpolated. NaN where the model saw no tissue. Raises `ConfigError`
        for an image that cannot be read, or a model that was trained without the local term.
        """
        if not has_maps(self.model):
            raise ConfigError(f"{self.folder}: was trained without the local term, so it has no heat maps")
        (text,) = self.encoder.sentences([sentence])
        images = find_images([path], None, self.config.data.cache_folder)
        if len(images) != 1:
            raise ConfigError(f"{path}: holds {len(images)} images; name one file")
        (found,) = pictures(self.recipe(), images, 0)
        if isinstance(found, Refusal):
            raise ConfigError(f"{found.file}: {found.reason}: {found.message}")
        canvas = self.preprocessing.canvas
        _, _, values = self.encoder.forward(found.canvas[None], self.encoder.asked([text]))
        return to_original(values[0, 0], found.seen(), canvas.size, canvas.fit)

    def recipe(self, for_processing: bool = False) -> Recipe:
        """How a picture is made for this model. Where training preferred images FOR PRESENTATION, raw ones are
        rendered to look like them; where it had raw images as they are stored, they stay so.
        """
        made = self.preprocessing
        picture = made.picture
        if for_processing and made.intent == "presentation":
            picture = replace(picture, process_raw=True)
        return Recipe(picture, made.quality, made.canvas.size, made.canvas.fit, for_processing)

    def _document(
        self,
        images: Sequence[Embedded],
        tasks: Sequence[ScoredTask],
        sentences: list[str],
        refused: Sequence[Refusal],
        pool: Pool,
    ) -> Document:
        exams = []
        if images:
            vectors, scale = np.stack([one.embedding for one in images]), self.model.scale().item()
            scores = [
                score(one, vectors, [self.encoder.embed_sentences(texts) for texts in one.ensembles], scale)
                for one in tasks
            ]
            exams = exams_of(images, tasks, scores, pool)
        for one in tasks:
            if exams and not any(one.task.name in exam["scores"] for exam in exams):
                log.warning("%s: none of the images is one of those that the task is about", one.task.name)
        return Document(
            model=self.facts,
            notice=NOTICE,
            pool=pool,
            tasks={one.task.name: _task_facts(one) for one in tasks},
            not_taught={one.task.name: one.not_taught for one in tasks if one.not_taught},
            sentences=sentences,
            exams=exams,
            refused=[RefusedFile(file=one.file, reason=one.reason, message=one.message) for one in refused],
        )


def _task_facts(one: ScoredTask) -> TaskFacts:
    return TaskFacts(
        title=one.task.title,
        classes=one.classes,
        binary=one.task.binary,
        calibration=one.method,
        reason=one.reason,
        left_out=one.left_out or None,
    )


def _device(name: str) -> torch.device:
    """A device by PyTorch's name. Raises `ConfigError` if there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"device: {name!r} cannot be used ({one_line(error)[:80]}); without it one is chosen"
        ) from None
    return device
