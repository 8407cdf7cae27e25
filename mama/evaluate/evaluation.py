"""Evaluation: a consolidated run against held-out patients, beside the same model before its first step.

Writes, below `<run>/eval/` or for other images than the run's own below `<run>/eval-on/` (see
`mama.evaluate.provenance`), for each task `metrics.json` and `predictions.csv`, and what the report shows besides:
`retrieval/examples.json`, `alignment/metrics.json` and `alignment/maps.npz`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.evaluate import linear_probe, localisation, results, retrieval, zero_shot
from mama.evaluate import provenance as measured_on
from mama.evaluate.embeddings import Features, Item, Split, embed_images, embed_texts
from mama.evaluate.metrics import Floats
from mama.evaluate.results import Results, results_table
from mama.evaluate.task_data import Answer, Question, ask
from mama.evaluate.tasks import TASKS, wording_of
from mama.evaluate.training_vocabulary import training_statements
from mama.export.consolidate import load_model
from mama.model import attention
from mama.model.mama_model import MamaModel, build
from mama.runtime.collectives import local_device
from mama.settings.load import load_run
from mama.settings.schema import Config, ConfigError, DataConfig
from shards.progress import progress
from shards.schema import ShardError, Study

__all__ = ["evaluate", "results_table"]

log = logging.getLogger(__name__)


def evaluate(config: Config, run: Path) -> Results:
    """Measure `<run>/model` on the split `config.eval.split`; returns each task's metrics, and "alignment"'s.

    The files are written when everything is measured, and replace those of an earlier evaluation of the same images.
    """
    measured = measured_on.identity(config, run)
    # Another seed or shape would make another untrained model.
    trained_with = load_run(run) if (run / "config.yaml").exists() else config
    if (told := config.data.tell_pathology) != trained_with.data.tell_pathology:
        raise ConfigError(f"data.tell_pathology: {told}, but {run} was trained with the opposite; leave it as it was")
    held, train = Split(config, config.eval.split), Split(config, "train")
    wording = wording_of(_studies(held), config.data.style, config.data.tell_pathology)
    said = _said_in_training(trained_with.data, config.data, train)
    questions = [ask(TASKS[name], held.items, train.items, wording, said) for name in config.eval.tasks]
    drawn: dict[str, localisation.Floats] = {}
    for name, model, tokenizer in _models(trained_with, run, local_device()):
        features = _answer(questions, name, model, tokenizer, held, train, config)
        targets = localisation.targets(held, tokenizer, config.data.max_tokens) if trained_with.loss.local else []
        drawn[name] = localisation.maps(model, tokenizer, held, targets, config, local_device())
        if name == "trained":
            retrieved = measured | _retrieve(features, held.items, model, tokenizer, config)
    if config.eval.intensity_baseline and held.name != "train":
        seen, asked = _intensities(train), _intensities(held)
        for question in questions:
            _probe(question, "31 intensity percentiles", seen, asked, train.items, config.seed)
    for question in questions:
        question.answers.sort(key=lambda answer: answer.protocol != "zero-shot")
    shown = localisation.examples(targets, config.eval.heat_maps)
    found = {q.task.name: measured | results.document(q, held.items, held.name, config) for q in questions}
    found["alignment"] = measured | _alignment(drawn, targets, shown, held, config)
    if not trained_with.loss.local:
        found["alignment"]["reason"] = "the model was trained without the local term"
    for name, document in found.items():
        if note := results.untaught_note(document):
            log.warning("%s: %s", name, note)
    folder = measured_on.folder_of(measured["shards"], run)
    log.info("writing the results to %s", folder)
    with measured_on.replaced(folder) as new:
        results.write(found, questions, held.items, retrieved, drawn["trained"][shown], new)
        measured_on.finish(config, measured, folder, new)
    return found


def _answer(
    questions: list[Question],
    name: str,
    model: MamaModel,
    tokenizer: Tokenizer,
    held: Split,
    train: Split,
    config: Config,
) -> Features:
    """Put the questions to a model, by zero-shot and by probe; returns the features of the held-out images."""
    device = next(model.parameters()).device
    features = embed_images(model, held, config, device, name)
    probed = None if held.name == "train" else embed_images(model, train, config, device, name)
    for question in questions:
        _zero_shot(question, name, features, model, tokenizer, config)
        if probed is not None:
            _probe(question, name, probed.tower, features.tower, train.items, config.seed)
    return features


def _studies(split: Split) -> list[Study]:
    return [item.study for item in split.items if item.position == 0]


def _said_in_training(own: DataConfig, asked: DataConfig, train: Split) -> set[str] | None:
    """What the texts of the run's `own` shards said; None where those are not there any more.

    `train` is the training split of the shards that are `asked` about, which mostly are the same.
    """
    if own.shards == asked.shards:
        return training_statements(_studies(train), own)
    try:
        images = Images(own, "train")
        return training_statements((images.study(n) for n in range(len(images.studies))), own)
    except (ConfigError, ShardError, OSError):
        return None


def _models(config: Config, run: Path, device: torch.device) -> Iterator[tuple[str, MamaModel, Tokenizer]]:
    """The trained model, then the untrained one: only one is held at a time."""
    model, tokenizer = load_model(run / "model", device)
    yield "trained", model, tokenizer
    del model
    untrained = build(config, tokenizer, attention.choose(config.train.attention, device))
    yield "untrained", untrained.to(device).eval(), tokenizer


def _zero_shot(
    question: Question, name: str, features: Features, model: MamaModel, tokenizer: Tokenizer, config: Config
) -> None:
    if not len(question.rows):
        return
    device = next(model.parameters()).device
    texts = [embed_texts(model, tokenizer, variants, config, device) for variants in question.texts]
    images = features.embeddings[question.rows]
    scores = zero_shot.probabilities(images, zero_shot.class_embeddings(texts), model.scale().item())
    question.answers.append(Answer("zero-shot", name, scores))


def _probe(
    question: Question,
    name: str,
    train: linear_probe.Features,
    held: linear_probe.Features,
    items: list[Item],
    seed: int,
) -> None:
    """Fit on the labelled training images; nothing to learn from fewer than two classes."""
    if not len(question.rows) or len(set(question.train_labels.tolist())) < 2:
        return
    patients = [items[i].study.patient for i in question.train_rows]
    classifier = linear_probe.fit(train[question.train_rows], question.train_labels, patients, seed)
    scores = linear_probe.probabilities(classifier, held[question.rows], len(question.classes))
    question.answers.append(Answer("linear probe", name, scores))


def _intensities(split: Split) -> Floats:
    items = progress(split.items, len(split), f"intensities: {split.name}", "images")
    return np.stack([linear_probe.intensity_percentiles(split.stored(item)) for item in items])


def _retrieve(
    features: Features, items: list[Item], model: MamaModel, tokenizer: Tokenizer, config: Config
) -> dict[str, Any]:
    texts, own = retrieval.distinct_texts(items, config.data.style, config.data.tell_pathology)
    embedded = embed_texts(model, tokenizer, texts, config, next(model.parameters()).device)
    return retrieval.examples(items, texts, own, features.embeddings, embedded)


def _alignment(
    drawn: dict[str, localisation.Floats],
    targets: list[localisation.Target],
    shown: list[int],
    held: Split,
    config: Config,
) -> dict[str, Any]:
    """The pointing game over all findings, and the facts of those in `shown`, whose maps are kept."""
    trained = drawn["trained"]
    grid = (trained.shape[1], trained.shape[2])
    grey = localisation.brightest(held, targets, grid) if targets else trained
    scores = {**drawn, "brightest patch": grey}
    document = localisation.pointing_game(scores, grey, targets, held.size, config)
    document["examples"] = [
        {
            "image": targets[i].item.key,
            "sentence": targets[i].text[targets[i].sentence],
            "facts": retrieval.facts(targets[i].item.view),
            "boxes": targets[i].boxes,
        }
        for i in shown
    ]
    return document
