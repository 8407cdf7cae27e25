"""Evaluation: a consolidated run against held-out patients, beside the same model before its first step.

Writes, below `<run>/eval/`, for each task `metrics.json` and `predictions.csv`, and what the report
shows besides: `retrieval/examples.json`, `alignment/metrics.json` and `alignment/maps.npz`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mama import attention, heatmap, metrics, probe, retrieval, zeroshot
from mama.config import Config
from mama.consolidate import load_model
from mama.dist import local_device
from mama.features import Features, Item, Split, embed_images, embed_texts
from mama.metrics import Floats, Ints
from mama.model import MamaModel, build
from mama.run import write_json
from mama.tasks import TASKS, Sentences, Task, Wording, prompts, wording_of
from mama.tokens import Tokenizer
from shards.progress import progress

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Probabilities [n, K] that one protocol gave with one model."""

    protocol: str
    model: str
    scores: Floats


@dataclass
class Question:
    """A task put to a split: `rows` are its labelled images, `labels` their classes.

    The classes are those that occur in the data set, numbered anew; the two of a binary task always.
    """

    task: Task
    classes: list[str]
    texts: list[list[Sentences]]
    rows: Ints
    labels: Ints
    train_rows: Ints
    train_labels: Ints
    absent: list[str]
    answers: list[Answer] = field(default_factory=list)


def evaluate(config: Config, run: Path) -> Results:
    """Measure `<run>/model` on the split `config.eval.split`; returns each task's metrics, and "alignment"'s."""
    device = local_device()
    held = Split(config, config.eval.split)
    train = Split(config, "train")
    wording = wording_of(item.study for item in held.items)
    questions = [ask(TASKS[name], held.items, train.items, wording) for name in config.eval.tasks]
    drawn: dict[str, heatmap.Floats] = {}
    for name, model, tokenizer in _models(config, run, device):
        features = embed_images(model, held, config, device, name)
        probed = None if held.name == "train" else embed_images(model, train, config, device, name)
        for question in questions:
            _zero_shot(question, name, features, model, tokenizer, config)
            if probed is not None:
                _probe(question, name, probed.tower, features.tower, train.items, config.seed)
        targets = heatmap.targets(held, tokenizer, config.data.max_tokens)
        drawn[name] = heatmap.maps(model, tokenizer, held, targets, config, device)
        if name == "trained":
            _retrieve(features, held.items, model, tokenizer, config, run / "eval" / "retrieval")
    if config.eval.intensity_baseline and held.name != "train":
        known, asked = _intensities(train), _intensities(held)
        for question in questions:
            _probe(question, "31 intensity percentiles", known, asked, train.items, config.seed)
    results = {q.task.name: _write(q, held, config, run / "eval" / q.task.name) for q in questions}
    results["alignment"] = _write_alignment(drawn, targets, held, config, run / "eval" / "alignment")
    return results


def results_table(results: Results) -> str:
    """The main figures as text: one line for each task, protocol and model."""
    head = ("task", "protocol", "model", "AUC [95 %]", "balanced accuracy [95 %]", "chance", "images", "patients")
    lines = [head]
    for name, document in results.items():
        if name == "alignment":
            continue
        for row in document["rows"]:
            auc, accuracy = (shown(row["metrics"][key]) for key in ("auc", "balanced_accuracy"))
            chance = f"{document['chance']:.2f}" if document["chance"] else "n/a"
            sizes = (str(document["images"]), str(document["patients"]))
            lines.append((name, row["protocol"], row["model"], auc, accuracy, chance, *sizes))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:]])


def shown(estimate: dict[str, Any]) -> str:
    """An estimate as read by a person: "0.912 [0.880, 0.940]", or "n/a"."""
    if estimate["value"] is None:
        return "n/a"
    interval = f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate["low"] is not None else ""
    return f"{estimate['value']:.3f}{interval}"


def ask(task: Task, held: list[Item], train: list[Item], wording: Wording) -> Question:
    """Find the images that `task` is about, and the classes that the data set has."""
    labels = [[task.label(item.view) for item in items] for items in (held, train)]
    occurring = {label for part in labels for label in part if label is not None}
    kept = [k for k in range(len(task.classes)) if task.binary or k in occurring]
    rows = [np.array([i for i, label in enumerate(part) if label is not None], dtype=np.int64) for part in labels]
    numbers = [np.array([kept.index(k) for k in part if k is not None], dtype=np.int64) for part in labels]
    texts = prompts(task, wording)
    return Question(
        task=task,
        classes=[task.classes[k] for k in kept],
        texts=[texts[k] for k in kept],
        rows=rows[0],
        labels=numbers[0],
        train_rows=rows[1],
        train_labels=numbers[1],
        absent=[name for k, name in enumerate(task.classes) if k not in labels[0]],
    )


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
    scores = zeroshot.probabilities(images, zeroshot.class_embeddings(texts), float(model.scale()))
    question.answers.append(Answer("zero-shot", name, scores))


def _probe(
    question: Question,
    name: str,
    train: Floats | heatmap.Floats,
    held: Floats | heatmap.Floats,
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


def _write(question: Question, held: Split, config: Config, folder: Path) -> dict[str, Any]:
    """Measure the answers, write `predictions.csv` and then `metrics.json`; returns the latter."""
    patients = [held.items[i].study.patient for i in question.rows]
    present = Counter(question.labels.tolist())
    document = {
        "task": question.task.name,
        "title": question.task.title,
        "binary": question.task.binary,
        "split": held.name,
        "images": len(question.rows),
        "patients": len(set(patients)),
        "unlabelled": len(held) - len(question.rows),
        "classes": [{"name": name, "images": present[k]} for k, name in enumerate(question.classes)],
        "absent": question.absent,
        "chance": 1 / len(present) if present else None,
        "bootstrap": {"resamples": config.eval.bootstrap, "unit": "patient", "seed": config.seed},
        "prompts": {name: texts[0] for name, texts in zip(question.classes, question.texts, strict=True)},
        "prompt_variants": [len(texts) for texts in question.texts],
        "rows": [
            {
                "protocol": answer.protocol,
                "model": answer.model,
                "metrics": {
                    name: asdict(estimate)
                    for name, estimate in metrics.measure(
                        question.labels,
                        answer.scores,
                        patients,
                        question.task.binary,
                        config.eval.bootstrap,
                        config.seed,
                    ).items()
                },
                "confusion": metrics.confusion(question.labels, answer.scores).tolist(),
            }
            for answer in sorted(question.answers, key=lambda a: a.protocol != "zero-shot")
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(question, held.items, folder / "predictions.csv")
    write_json(folder / "metrics.json", document)
    return document


def _write_predictions(question: Question, items: list[Item], path: Path) -> None:
    aside = path.with_suffix(".partial")
    with aside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["protocol", "model", "image", "patient", "label", *question.classes])
        for answer in question.answers:
            for row, label, scores in zip(question.rows, question.labels, answer.scores, strict=True):
                item = items[row]
                shares = [f"{score:.6g}" for score in scores]
                facts = [item.key, item.study.patient, question.classes[label]]
                writer.writerow([answer.protocol, answer.model, *facts, *shares])
    aside.rename(path)


def _retrieve(
    features: Features, items: list[Item], model: MamaModel, tokenizer: Tokenizer, config: Config, folder: Path
) -> None:
    texts, own = retrieval.distinct_texts(items)
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
