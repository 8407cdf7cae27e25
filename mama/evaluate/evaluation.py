"""Evaluation of a consolidated model on held-out patients, beside the same model before its first training step.

Writes to `<run>/eval/`, or for other images than the run's own test split below `<run>/eval-on/` (see
`mama.evaluate.result_folders`): `metrics.json` and `predictions.csv` of each task, `retrieval/metrics.json`, and for
the report `retrieval/examples.json`, `alignment/metrics.json` and `alignment/maps.npz`. What a model makes of the
images stays in `<run>/features/` (see `mama.evaluate.kept_features`). Of a model folder by itself, which is in no run,
the results lie in the run folder that its `config` names, and the weights before training are unknown.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mama.data.held_out import Split
from mama.data.images import Images
from mama.data.tokenizer import Tokenizer
from mama.data.wording import training_statements, wording_of
from mama.errors import ConfigError
from mama.evaluate import (
    box_files,
    fine_tuned,
    known_patients,
    local_retrieval,
    localisation,
    outputs,
    own_figures,
    paper,
    predicting,
    provenance,
    result_folders,
    results,
    retrieval,
)
from mama.evaluate.detection import Marks
from mama.evaluate.kept_features import FOLDER, KeptFeatures
from mama.evaluate.outputs import INTENSITIES, Outputs, Splits
from mama.evaluate.provenance import Document
from mama.evaluate.results import Results, unmentioned_note
from mama.evaluate.task_data import TaskData, task_data
from mama.evaluate.tasks import load_tasks
from mama.export.model_folder import is_bare, load_model, model_folder, require_model
from mama.export.trained_on import read_trained_on
from mama.model import attention
from mama.model.mama_model import MamaModel, build
from mama.run.kept_settings import flat, is_among
from mama.runtime import sharing
from mama.runtime.collectives import local_device, rank
from mama.settings.load import load, load_run
from mama.settings.paper import resolved
from mama.settings.schema import Config, DataConfig
from shards.errors import ShardError
from shards.schema import Study

log = logging.getLogger(__name__)

MAY_DIFFER = ("pack", "data.workers", "data.cache")  # settings of ranks that share an evaluation

Show = Callable[[str], object]


def evaluate(config: Config, run: Path, show: Show | None = None) -> Results:
    """Evaluate the model of `run`, or the model folder `run`, on the split `config.eval.split` of its data.

    Returns the metrics of each task, of "alignment" and of "retrieval"; `show` gets each as a table as soon as it is
    measured. Ranks that a launcher started share the images, in the same batches as a single process, and rank 0 alone
    predicts, writes, and returns the metrics: the others return {} once nothing is left to share. The files are written
    once everything is measured, and replace those of an earlier evaluation of the same images.

    Raises `ConfigError` without a model, if `data.tell_pathology` is not that of training, if the model was trained on
    some of these patients (`eval.known_patients`), or for a file of `eval.boxes` that is not of these images;
    `RankError` if another rank ended.
    """
    config = resolved(config)
    with sharing.joined():
        measured = _agreed(config, run)
        require_model(model_folder(run))
        trained_with = _settings_of_training(config, run)
        splits = outputs.splits_of(config, measured["shards"])
        detected = box_files.marks(config, splits.held_out)
        trained_on = read_trained_on(model_folder(run))
        measured["known"] = known_patients.check(splits.held_out, measured["shards"], trained_on, config)
        tasks = _tasks(config, trained_with, splits)
        for data in tasks if config.eval.protocol == "paper" else ():
            paper.restrict(data)
        made, sought = _outputs(config, run, trained_with, measured, splits, tasks)
        for data in tasks if "probe" in config.eval.protocols and rank() == 0 else ():
            for name, one in made.items():
                predicting.probe(data, name, one, splits, config)
        if "finetune" in config.eval.protocols and splits.train:
            fine_tuned.add_predictions(tasks, splits.held_out, splits.val, measured["shards"], config, run)
        if rank() > 0:
            return {}
    documents = {}
    for data in tasks:
        documents[data.task.name] = measured | _document(data, made, splits, config)
        _tell(data.task.name, documents[data.task.name], show)
    items, (texts, own) = splits.held_out.items, _texts(splits.held_out, config)
    retrieved = {name: (one.images[config.eval.split], one.texts) for name, one in made.items() if one.images}
    documents["retrieval"] = measured | retrieval.recall(items, own, retrieved, config)
    if show:
        show(retrieval.table(documents["retrieval"]) + "\n")
    maps = {name: one.maps for name, one in made.items() if one.maps is not None}
    shown = localisation.examples(sought.targets, config.eval.heat_maps)
    aligned = _alignment(maps, sought, shown, detected, splits, config)
    models = {name: local_retrieval.Embedded(one.scores, *retrieved[name]) for name, one in maps.items()}
    aligned["local_retrieval"] = local_retrieval.document(
        models, own, sought.asked, sought.rows, sought.targets, items, config
    )
    if not trained_with.loss.local:
        aligned["reason"] = aligned["local_retrieval"]["reason"] = "the model was trained without the local term"
    documents["alignment"] = measured | aligned
    if show and (lines := results.localisation_lines(documents["alignment"])):
        show("\n".join(lines))
    examples = measured | retrieval.examples(items, texts, own, *retrieved["trained"])
    place = _place(config, run)
    with result_folders.one_writer(place):
        folder = result_folders.folder_of(measured["shards"], place)
        log.info("writing the results to %s", folder)
        with result_folders.replaced_results(folder) as new:
            results.write(documents, tasks, items, examples, maps["trained"].own[shown], new)
            result_folders.finish(config, measured, folder, new)
        own_figures.record(config, trained_with, run, folder)
    return documents


def _place(config: Config, run: Path) -> Path:
    """The run folder that gets the results: of a model folder by itself the one that `config` names."""
    return config.run_folder if is_bare(run) else run


def _agreed(config: Config, run: Path) -> Document:
    """What is measured. Raises `ConfigError` on all ranks if one of them would measure something else."""
    measured = provenance.identity(config, run)
    settings = {key: value for key, value in flat(asdict(config)).items() if not is_among(key, MAY_DIFFER)}
    model = (measured["model"] or {}).get("sha256")
    boxes = measured["settings"]["boxes"]
    found = {"run": str(run), **settings, "boxes": boxes, "shards": measured["shards"]["digest"], "model": model}
    sharing.require_same(found)
    return measured


def _settings_of_training(config: Config, run: Path) -> Config:
    """They build the untrained model: another seed or shape would make another one."""
    if is_bare(run):
        found = load(run / "config.yaml")
        trained_with = replace(found, data=replace(found.data, shards=[], shard_weights=[]))  # not those of this name
    else:
        trained_with = load_run(run) if (run / "config.yaml").exists() else config
    tell = config.data.tell_pathology
    if tell != trained_with.data.tell_pathology:
        raise ConfigError(f"data.tell_pathology: {tell}, but {run} was trained with {not tell}; leave it out")
    return trained_with


def _tasks(config: Config, trained_with: Config, splits: Splits) -> list[TaskData]:
    wording = wording_of(_studies(splits.held_out), config.data.style, config.data.tell_pathology)
    train = splits.held_out if config.eval.split == "train" else splits.train
    mentioned = _mentioned_in_training(trained_with.data, config.data, train)
    of_train, of_val = ([] if split is None else split.items for split in (train, splits.val))
    return [
        task_data(task, splits.held_out.items, of_train, of_val, wording, mentioned)
        for task in load_tasks(config.eval.tasks)
    ]


def _studies(split: Split) -> list[Study]:
    return [item.study for item in split.items if item.position == 0]


def _mentioned_in_training(own: DataConfig, evaluated: DataConfig, train: Split | None) -> set[str] | None:
    """The statements in the texts of the run's `own` training shards; None if those shards are gone.

    `train` is the training split of the `evaluated` shards, which are usually the same.
    """
    if own.shards == evaluated.shards and train is not None:
        return training_statements(_studies(train), own)
    try:
        images = Images(own, "train")
        return training_statements((images.study(n) for n in range(len(images.studies))), own)
    except (ConfigError, ShardError, OSError):
        return None


def _models(
    config: Config, run: Path, device: torch.device, base: str | None
) -> Iterator[tuple[str, MamaModel, Tokenizer]]:
    """The trained model, then the untrained one, unless `run` is a model folder: only one is in memory at a time.

    `base` is the place of the base, if the trained model is an adapter.
    """
    model, tokenizer = load_model(model_folder(run), device, base)
    yield "trained", model, tokenizer
    del model
    if not is_bare(run):
        untrained = build(config, tokenizer, *attention.choose_both(config, device))
        yield "untrained", untrained.to(device).eval(), tokenizer


def _outputs(
    config: Config, run: Path, trained_with: Config, measured: Document, splits: Splits, tasks: list[TaskData]
) -> tuple[dict[str, Outputs], localisation.Search]:
    """The outputs of each model, with which the tasks get their zero-shot predictions; and what its maps look for.

    Every rank must call it; on ranks other than the first nothing is predicted.
    """
    kept = KeptFeatures(_place(config, run) / FOLDER, config, local_device())
    texts, _ = _texts(splits.held_out, config)
    made: dict[str, Outputs] = {}
    sought = localisation.Search()
    for name, model, tokenizer in _models(trained_with, run, kept.device, config.text.model):
        if name == "trained" and trained_with.loss.local:
            sought = localisation.search(splits.held_out, tokenizer, config.data.max_tokens, trained_with.loss)
        weights = measured["model"]["sha256"] if name == "trained" else None
        known = outputs.identity(name, model, model_folder(run), weights)
        made[name] = outputs.of_model(model, tokenizer, splits, texts, sought, kept, known)
        for data in tasks if "zeroshot" in config.eval.protocols else ():
            predicting.zero_shot(data, name, made[name], splits, model, tokenizer, config)
        del model  # before the next one is built
    if config.eval.intensity_baseline and splits.train:
        made[INTENSITIES] = outputs.intensities(splits, kept)
    return made, sought


def _texts(held_out: Split, config: Config) -> tuple[list[list[str]], list[int]]:
    return retrieval.distinct_texts(held_out.items, config.data.style, config.data.tell_pathology)


def _document(data: TaskData, made: dict[str, Outputs], splits: Splits, config: Config) -> Document:
    """All predictions of a task, measured; `not_measured` has the reasons for rows that are not there."""
    missing: list[dict[str, str | None]] = []
    if "untrained" not in made:
        reason = "a model folder by itself has neither the recipe of the run nor the weights that it began with"
        missing.append({"protocol": None, "model": "untrained", "reason": reason})
    missing += predicting.missing(data, splits, config.eval.protocols)
    return results.document(data, splits.held_out.items, splits.held_out.name, config) | {"not_measured": missing}


def _tell(name: str, document: Document, show: Show | None) -> None:
    if note := unmentioned_note(document):
        log.warning("%s: %s", name, note)
    if show:
        missing: dict[str, list[str]] = defaultdict(list)
        for one in document["not_measured"]:
            missing[one["reason"]].append(one["protocol"] or one["model"])
        lines = [f"no {', '.join(those)}: {reason}" for reason, those in missing.items()]
        show("\n".join([results.results_table({name: document}), *lines, ""]))


def _alignment(
    maps: dict[str, localisation.Maps],
    sought: localisation.Search,
    shown: list[int],
    detected: dict[str, list[Marks]],
    splits: Splits,
    config: Config,
) -> dict[str, Any]:
    """Figures of the maps and of boxes in files, and the examples: the targets `shown`, whose maps are kept."""
    document, targets = localisation.document(maps, sought, splits.held_out, detected, config), sought.targets
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
