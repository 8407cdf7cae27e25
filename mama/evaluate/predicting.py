"""The predictions of a task: zero-shot by class prompts, and by a probe on the features of the training images."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from mama.data.held_out import Item
from mama.data.tokenizer import Tokenizer
from mama.evaluate import fractions, linear_probe, paper
from mama.evaluate import zero_shot as class_scores
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.embeddings import embed_texts
from mama.evaluate.outputs import INTENSITIES, NOTHING, Outputs, Splits
from mama.evaluate.task_data import Predictions, TaskData
from mama.evaluate.tasks import why_none_of
from mama.model.mama_model import MamaModel
from mama.runtime.collectives import rank
from mama.settings.schema import Config

NAMES = {"zeroshot": "zero-shot", "probe": "linear probe", "finetune": "fine-tune"}  # in `eval.protocols` -> in results


def zero_shot(
    data: TaskData,
    name: str,
    made: Outputs,
    splits: Splits,
    model: MamaModel,
    tokenizer: Tokenizer,
    config: Config,
) -> None:
    """Append the predictions of a model, called `name`, to those of the task; nothing if no image has its label.

    Every rank must call it; on ranks other than the first nothing is predicted.
    """
    if not len(data.rows):
        return
    device = next(model.parameters()).device

    def embed(texts: list[list[str]]) -> Float32s:
        return embed_texts(model, tokenizer, texts, config, device)

    scale = model.scale().item()
    if config.eval.protocol == "paper":
        scored = partial(paper.zero_shot_scores, data.ensembles, embed=embed, scale=scale)
    else:
        ensembles = [embed(texts) for texts in data.ensembles]
        if rank() > 0:
            return
        classes = class_scores.class_embeddings(ensembles)
        scored = partial(_by_classes, classes=classes, scale=scale)
    images = made.images.get(splits.held_out.name, NOTHING)
    scores = scored(splits.held_out.items, data.rows, images)
    if name == "trained" and config.eval.protocol == "standard":
        how = data.templates, scale, data.task.binary
        data.sensitivity = class_scores.by_template(images[data.rows], data.labels, ensembles, *how)
    val = None
    if splits.val and len(data.val_rows):
        val = scored(splits.val.items, data.val_rows, made.images.get("val", NOTHING))
    if rank() == 0:
        data.predictions.append(Predictions("zero-shot", name, scores, val))


def _by_classes(items: list[Item], rows: Ints, images: Float32s, classes: Float32s, scale: float) -> Float64s:
    return class_scores.probabilities(images[rows], classes, scale)


def probe(data: TaskData, name: str, made: Outputs, splits: Splits, config: Config) -> None:
    """Append the predictions of a probe on the features of `name`, fitted on each draw of the training labels.

    Nothing if there is a reason against it. Of all labels there is one draw, whose rows are all of them in their order.
    """
    if splits.train is None or not len(data.rows) or no_probe(data, splits):
        return
    patients = [splits.train.items[i].study.patient for i in data.train_rows]
    held_out = made.tower[splits.held_out.name][data.rows]
    for fraction, draw in fractions.draws(config.eval):
        seed = fractions.seed_of(config.seed, draw)
        rows = fractions.drawn(patients, data.train_labels, fraction, seed)
        features, labels = made.tower["train"][data.train_rows[rows]], data.train_labels[rows]
        classifier: linear_probe.Pipeline | linear_probe.Softmax
        if config.eval.protocol == "paper" and name != INTENSITIES:
            classifier = linear_probe.fit_by_sgd(features, labels, seed, config.finetune)
        else:
            classifier = linear_probe.fit(features, labels, [patients[i] for i in rows], config.seed)
        scores = linear_probe.probabilities(classifier, held_out, len(data.classes))
        val = None
        if splits.val and len(data.val_rows):
            val = linear_probe.probabilities(classifier, made.tower["val"][data.val_rows], len(data.classes))
        data.predictions.append(Predictions("linear probe", name, scores, val, fraction, draw))


def missing(data: TaskData, splits: Splits, protocols: Collection[str]) -> list[dict[str, str | None]]:
    """The `protocols` of which a task has no row, each with the reason."""
    if not len(data.rows):
        reason = why_none_of(data.task, ((item.study, item.view) for item in data.held_out))
        return [{"protocol": NAMES[name], "model": None, "reason": reason} for name in protocols]
    reasons = {"probe": no_probe(data, splits)} if "probe" in protocols else {}
    return [{"protocol": NAMES[name], "model": None, "reason": reason} for name, reason in reasons.items() if reason]


def no_probe(data: TaskData, splits: Splits) -> str | None:
    """Why there is no probe for a task, if there is none."""
    if splits.held_out.name == "train":
        return "the images are those of the train split, on which it would be fitted"
    if splits.train is None:
        return "the shards have no train split, on which it would be fitted"
    if len(set(data.train_labels.tolist())) < 2:
        return "the train split has labelled images of fewer than two classes"
    return None
