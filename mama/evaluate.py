"""Evaluation: a consolidated run against held-out patients, beside the same model before its first step.

Writes, below `<run>/eval/`, for each task `metrics.json` and `predictions.csv`, and what the report
shows besides: `retrieval/examples.json`, `alignment/metrics.json` and `alignment/maps.npz`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mama import attention, heatmap, probe, results, retrieval, zeroshot
from mama.config import Config
from mama.consolidate import load_model
from mama.dist import local_device
from mama.features import Features, Item, Split, embed_images, embed_texts
from mama.files import write_json
from mama.metrics import Floats
from mama.model import MamaModel, build
from mama.questions import Answer, Question, ask
from mama.results import Results, results_table
from mama.tasks import TASKS, wording_of
from mama.tokens import Tokenizer
from shards.progress import progress

__all__ = ["evaluate", "results_table"]


def evaluate(config: Config, run: Path) -> Results:
    """Measure `<run>/model` on the split `config.eval.split`; returns each task's metrics, and "alignment"'s."""
    device = local_device()
    held = Split(config, config.eval.split)
    train = Split(config, "train")
    wording = wording_of((item.study for item in held.items), config.data.style)
    questions = [ask(TASKS[name], held.items, train.items, wording) for name in config.eval.tasks]
    drawn: dict[str, heatmap.Floats] = {}
    for name, model, tokenizer in _models(config, run, device):
        features = embed_images(model, held, config, device, name)
        probed = None if held.name == "train" else embed_images(model, train, config, device, name)
        for question in questions:
            _zero_shot(question, name, features, model, tokenizer, config)
            if probed is not None:
                _probe(question, name, probed.tower, features.tower, train.items, config.seed)
        targets = heatmap.targets(held, tokenizer, config.data.max_tokens) if config.loss.local else []
        drawn[name] = heatmap.maps(model, tokenizer, held, targets, config, device)
        if name == "trained":
            _retrieve(features, held.items, model, tokenizer, config, run / "eval" / "retrieval")
    if config.eval.intensity_baseline and held.name != "train":
        known, asked = _intensities(train), _intensities(held)
        for question in questions:
            _probe(question, "31 intensity percentiles", known, asked, train.items, config.seed)
    for question in questions:
        question.answers.sort(key=lambda answer: answer.protocol != "zero-shot")
    folder = run / "eval"
    measured = {
        q.task.name: results.write(q, held.items, held.name, config.eval, config.seed, folder / q.task.name)
        for q in questions
    }
    return measured | {"alignment": _write_alignment(drawn, targets, held, config, folder / "alignment")}


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
    scores = zeroshot.probabilities(images, zeroshot.class_embeddings(texts), model.scale().item())
    question.answers.append(Answer("zero-shot", name, scores))


def _probe(
    question: Question,
    name: str,
    train: probe.Features,
    held: probe.Features,
    items: list[Item],
    seed: int,
) -> None:
    """Fit on the labelled training images; nothing to learn from fewer than two classes."""
    if not len(question.rows) or len(set(question.train_labels.tolist())) < 2:
        return
    patients = [items[i].study.patient for i in question.train_rows]
    classifier = probe.fit(train[question.train_rows], question.train_labels, patients, seed)
    scores = probe.probabilities(classifier, held[question.rows], len(question.classes))
    question.answers.append(Answer("linear probe", name, scores))


def _intensities(split: Split) -> Floats:
    items = progress(split.items, len(split), f"intensities: {split.name}", "images")
    return np.stack([probe.intensity_percentiles(split.stored(item)) for item in items])


def _retrieve(
    features: Features, items: list[Item], model: MamaModel, tokenizer: Tokenizer, config: Config, folder: Path
) -> None:
    texts, own = retrieval.distinct_texts(items, config.data.style)
    embedded = embed_texts(model, tokenizer, texts, config, next(model.parameters()).device)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "examples.json", retrieval.examples(items, texts, own, features.embeddings, embedded))


def _write_alignment(
    drawn: dict[str, heatmap.Floats], targets: list[heatmap.Target], held: Split, config: Config, folder: Path
) -> dict[str, Any]:
    """The pointing game over all findings, and the maps of a few."""
    trained = drawn["trained"]
    grid = (trained.shape[1], trained.shape[2])
    grey = heatmap.brightest(held, targets, grid) if targets else trained
    scores = {**drawn, "brightest patch": grey}
    document = heatmap.pointing_game(scores, grey, targets, held.size, config)
    if not config.loss.local:
        document["reason"] = "the model was trained without the local term"
    shown_ones = heatmap.examples(targets, config.eval.heat_maps)
    document["examples"] = [
        {
            "image": targets[i].item.key,
            "sentence": targets[i].text[targets[i].sentence],
            "facts": retrieval.facts(targets[i].item.view),
            "boxes": targets[i].boxes,
        }
        for i in shown_ones
    ]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "maps.npz", maps=trained[shown_ones])
    write_json(folder / "metrics.json", document)
    return document
