"""The evaluation protocol of the MaMA paper (`eval.protocol: paper`), as far as it is known.

docs/METHOD.md, "The paper's protocol", lists what is known and what had to be assumed. Letters: n images, K classes,
D shared width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from mama.data import report_text
from mama.data.held_out import Item
from mama.data.wording import Sentences
from mama.evaluate import zero_shot
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.task_data import TaskData
from mama.runtime.collectives import rank
from shards.progress import progress

SHARE, LEAST, SEED = 0.1, 200, 42  # of a class's held-out images
TEXTS = 2048  # prompts that are embedded at once, shared over the ranks


def balanced(labels: Ints) -> Ints:
    """The rows, ascending, of the balanced test subset of images with `labels` [n].

    Of each class max(10 %, 200) images, or all if there are fewer, drawn with seed 42.
    """
    rng = np.random.default_rng(SEED)
    rows = []
    for k in np.unique(labels):
        own = np.flatnonzero(labels == k)
        rows.append(rng.permutation(own)[: max(round(SHARE * len(own)), LEAST)])
    return np.sort(np.concatenate(rows)) if rows else np.arange(0)


def restrict(data: TaskData) -> None:
    """Keep the balanced test subset of a task's held-out images."""
    rows = balanced(data.labels)
    data.rows, data.labels = data.rows[rows], data.labels[rows]


def zero_shot_scores(
    ensembles: list[list[Sentences]],
    items: list[Item],
    rows: Ints,
    images: Float32s,
    embed: Callable[[list[list[str]]], Float32s],
    scale: float,
) -> Float64s:
    """Probabilities [n, K] of `rows` [n] by class prompts that state the image's own meta-information.

    `ensembles` are the prompts of each class, `items` all images of the split, `images` their unit embeddings [all, D].
    Images with the same meta-information have the same prompts, which are embedded once. `embed` may share the texts
    over the ranks: every rank must call this, and on others than the first the result is 0.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[tuple(report_text.meta(items[row].study, items[row].view).values())].append(place)
    wordings, sizes = list(groups.values()), [len(texts) for texts in ensembles]
    several = max(1, TEXTS // sum(sizes))
    parts = [wordings[start : start + several] for start in range(0, len(wordings), several)]
    scores = np.zeros((len(rows), len(ensembles)))
    for part in progress(parts, len(parts), "zero-shot with meta-information", f"times {several} wordings"):
        shown = [items[rows[places[0]]] for places in part]
        prompts = [text for texts in ensembles for text in texts]
        vectors = embed([report_text.with_meta(text, item.study, item.view) for item in shown for text in prompts])
        for places, own in zip(part, np.split(vectors, len(part)), strict=True) if rank() == 0 else ():
            classes = zero_shot.class_embeddings(np.split(own, np.cumsum(sizes)[:-1]))
            scores[places] = zero_shot.probabilities(images[rows[places]], classes, scale)
    return scores
