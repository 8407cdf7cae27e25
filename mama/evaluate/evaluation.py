"""Evaluation of a consolidated run on held-out patients, beside the same model before its first training step.

Writes to `<run>/eval/`, or for other images than the run's own test split below `<run>/eval-on/` (see
`mama.evaluate.result_folders`): `metrics.json` and `predictions.csv` of each task, and for the report
`retrieval/examples.json`, `alignment/metrics.json` and `alignment/maps.npz`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mama.data.held_out import Item, Split
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.evaluate import linear_probe, localisation, provenance, result_folders, results, retrieval, zero_shot
from mama.evaluate.arrays import Float32s, Float64s
from mama.evaluate.class_prompts import wording_of
from mama.evaluate.embeddings import Features, embed_images, embed_texts
from mama.evaluate.provenance import Document
from mama.evaluate.results import Results, unmentioned_note
from mama.evaluate.task_data import Predictions, TaskData, task_data
from mama.evaluate.tasks import load_tasks
from mama.evaluate.training_vocabulary import training_statements
from mama.export.model_folder import load_model
from mama.model import attention
from mama.model.mama_model import MamaModel, build
from mama.run.kept_settings import flat, is_among
from mama.runtime import sharing
from mama.runtime.collectives import local_device, rank
from mama.settings.load import load_run
from mama.settings.schema import Config, DataConfig
from shards.errors import ShardError
from shards.progress import progress
from shards.schema import Study

log = logging.getLogger(__name__)

MAY_DIFFER = ("pack", "data.workers", "data.cache")  # settings of ranks that share an evaluation


def evaluate(config: Config, run: Path) -> Results:
    """Evaluate `<run>/model` on the split `config.eval.split`; returns the metrics of each task and of "alignment".

    Ranks that a launcher started share the images, in the same batches as a single process, and rank 0 alone predicts,
    writes, and returns the metrics: the others return {} once nothing is left to share. The files are written once
    everything is measured, and replace those of an earlier evaluation of the same images.
    Raises `ConfigError` without a model, or if `data.tell_pathology` is not that of training; `RankError` if another
    rank ended.
    """
    with sharing.joined():
        measured = _agreed(config, run)
        trained_with = _settings_of_training(config, run)
        held_out, train = Split(config, config.eval.split), Split(config, "train")
        tasks = _tasks(config, trained_with, held_out, train)
        maps: dict[str, Float32s] = {}
        probed: dict[str, tuple[linear_probe.Features, linear_probe.Features]] = {}  # of training, of held-out images
        for name, model, tokenizer in _models(trained_with, run, local_device()):
            features = embed_images(model, held_out, config, local_device(), name)
            if held_out.name != "train":
                probed[name] = embed_images(model, train, config, local_device(), name).tower, features.tower
            targets = (
                localisation.find_targets(held_out, tokenizer, config.data.max_tokens)
                if trained_with.loss.local
                else []
            )
            maps[name] = localisation.maps(model, tokenizer, held_out, targets, config, local_device())
            if rank() == 0:
                for data in tasks:
                    _zero_shot(data, name, features, model, tokenizer, config)
                if name == "trained":
                    retrieved = measured | _retrieve(features, held_out.items, model, tokenizer, config)
        grey = localisation.brightest(held_out, targets, maps["trained"].shape[1:], config.eval.batch)
        if config.eval.intensity_baseline and held_out.name != "train":
            probed["31 intensity percentiles"] = _intensities(train, config), _intensities(held_out, config)
        if rank() > 0:
            return {}
    for data in tasks:
        for name, (of_train, of_held_out) in probed.items():
            _probe(data, name, of_train, of_held_out, train.items, config.seed)
    shown = localisation.examples(targets, config.eval.heat_maps)
    documents = {d.task.name: measured | results.document(d, held_out.items, held_out.name, config) for d in tasks}
    documents["alignment"] = measured | _alignment(maps, grey, targets, shown, held_out, config)
    if not trained_with.loss.local:
        documents["alignment"]["reason"] = "the model was trained without the local term"
    for name, document in documents.items():
        if note := unmentioned_note(document):
            log.warning("%s: %s", name, note)
    folder = result_folders.folder_of(measured["shards"], run)
    log.info("writing the results to %s", folder)
    with result_folders.replaced(folder) as new:
        results.write(documents, tasks, held_out.items, retrieved, maps["trained"][shown], new)
        result_folders.finish(config, measured, folder, new)
    return documents


def _agreed(config: Config, run: Path) -> Document:
    """What is measured. Raises `ConfigError` on all ranks if one of them would measure something else."""
    measured = provenance.identity(config, run)
    settings = {key: value for key, value in flat(asdict(config)).items() if not is_among(key, MAY_DIFFER)}
    model = (measured["model"] or {}).get("sha256")
    sharing.require_same({"run": str(run), **settings, "shards": measured["shards"]["digest"], "model": model})
    return measured


def _settings_of_training(config: Config, run: Path) -> Config:
    """They build the untrained model: another seed or shape would make another one."""
    trained_with = load_run(run) if (run / "config.yaml").exists() else config
    tell = config.data.tell_pathology
    if tell != trained_with.data.tell_pathology:
        raise ConfigError(f"data.tell_pathology: {tell}, but {run} was trained with {not tell}; leave it out")
    return trained_with


def _tasks(config: Config, trained_with: Config, held_out: Split, train: Split) -> list[TaskData]:
    wording = wording_of(_studies(held_out), config.data.style, config.data.tell_pathology)
    mentioned = _mentioned_in_training(trained_with.data, config.data, train)
    tasks = load_tasks(config.eval.tasks)
    return [task_data(task, held_out.items, train.items, [], wording, mentioned) for task in tasks]


def _studies(split: Split) -> list[Study]:
    return [item.study for item in split.items if item.position == 0]


def _mentioned_in_training(own: DataConfig, evaluated: DataConfig, train: Split) -> set[str] | None:
    """The statements in the texts of the run's `own` training shards; None if those shards are gone.

    `train` is the training split of the `evaluated` shards, which are usually the same.
    """
    if own.shards == evaluated.shards:
        return training_statements(_studies(train), own)
    try:
        images = Images(own, "train")
        return training_statements((images.study(n) for n in range(len(images.studies))), own)
    except (ConfigError, ShardError, OSError):
        return None


def _models(config: Config, run: Path, device: torch.device) -> Iterator[tuple[str, MamaModel, Tokenizer]]:
    """The trained model, then the untrained one: only one is in memory at a time."""
    model, tokenizer = load_model(run / "model", device)
    yield "trained", model, tokenizer
    del model
    untrained = build(config, tokenizer, attention.choose(config.train.attention, device))
    yield "untrained", untrained.to(device).eval(), tokenizer


def _zero_shot(
    data: TaskData, name: str, features: Features, model: MamaModel, tokenizer: Tokenizer, config: Config
) -> None:
    if not len(data.rows):
        return
    device = next(model.parameters()).device
    ensembles = [embed_texts(model, tokenizer, texts, config, device) for texts in data.ensembles]
    images = features.embeddings[data.rows]
    scale, binary = model.scale().item(), data.task.binary
    scores = zero_shot.probabilities(images, zero_shot.class_embeddings(ensembles), scale)
    data.predictions.append(Predictions("zero-shot", name, scores))
    if name == "trained":
        data.sensitivity = zero_shot.by_template(images, data.labels, ensembles, data.templates, scale, binary)


def _probe(
    data: TaskData,
    name: str,
    train: linear_probe.Features,
    held_out: linear_probe.Features,
    items: list[Item],
    seed: int,
) -> None:
    """Fit on the labelled training images, if they are of two classes at least; `items` are the training images."""
    if not len(data.rows) or len(set(data.train_labels.tolist())) < 2:
        return
    patients = [items[i].study.patient for i in data.train_rows]
    classifier = linear_probe.fit(train[data.train_rows], data.train_labels, patients, seed)
    scores = linear_probe.probabilities(classifier, held_out[data.rows], len(data.classes))
    data.predictions.append(Predictions("linear probe", name, scores))


def _intensities(split: Split, config: Config) -> Float64s:
    """Percentiles [n, 31] of each image; on ranks other than the first those of this rank's share."""

    def measure(batches: list[range]) -> Iterator[Float64s]:
        for rows in progress(batches, len(batches), f"intensities: {split.name}", "batches"):
            yield np.stack([linear_probe.intensity_percentiles(split.stored(split.items[row])) for row in rows])

    return np.concatenate(sharing.over_ranks(len(split), config.eval.batch, measure))


def _retrieve(
    features: Features, items: list[Item], model: MamaModel, tokenizer: Tokenizer, config: Config
) -> dict[str, Any]:
    texts, own = retrieval.distinct_texts(items, config.data.style, config.data.tell_pathology)
    embedded = embed_texts(model, tokenizer, texts, config, next(model.parameters()).device)
    return retrieval.examples(items, texts, own, features.embeddings, embedded)


def _alignment(
    maps: dict[str, Float32s],
    grey: Float32s,
    targets: list[localisation.Target],
    shown: list[int],
    held_out: Split,
    config: Config,
) -> dict[str, Any]:
    """The pointing game over all targets, and the examples: the targets `shown`, whose maps are kept."""
    scores = {**maps, "brightest patch": grey}
    document = localisation.pointing_game(scores, grey, targets, held_out.size, config)
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
