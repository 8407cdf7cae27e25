"""Retrieval among held-out images: the images nearest to a text, and the texts nearest to an image.

Letters: n images, t distinct texts, D shared width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from mama.data import report_text
from mama.data.held_out import Item
from mama.evaluate import bootstrap
from mama.evaluate.arrays import Float32s, Float64s, Ints
from mama.evaluate.results import format_estimate
from mama.settings.schema import Config, Style
from shards.schema import View

QUERIES, IMAGES, TEXTS = 6, 5, 3
RANKS = (1, 5, 10)  # of recall@k
CELLS = 2**24  # cosines that are held at once


def distinct_texts(items: list[Item], style: Style, tell_pathology: bool = False) -> tuple[list[list[str]], list[int]]:
    """The distinct texts of these images, all meta-information hidden, and for each image the index of its own."""
    hidden = frozenset(report_text.META)
    rows: dict[tuple[str, ...], int] = {}
    texts = (tuple(report_text.text(item.study, item.view, style, hidden, tell_pathology)) for item in items)
    own = [rows.setdefault(text, len(rows)) for text in texts]
    return [list(text) for text in rows], own


def recall(
    items: list[Item], own: list[int], embedded: dict[str, tuple[Float32s, Float32s]], config: Config
) -> dict[str, Any]:
    """Recall@1, @5 and @10 in both directions for each model, and by chance, as a JSON object.

    `own` [n] is the number of each image's text, `embedded` holds the unit embeddings [n, D] and [t, D] by model.
    Image to text: the share of images whose own text is among the k nearest of the t. Text to image: the share of
    texts of which an image is among the k nearest of the n. Of equal cosines the wrong one comes first, so that a model
    that tells nothing apart finds nothing. Intervals are over the patients; a text is its first image's patient's.
    """
    numbers, texts = np.array(own), len(set(own))
    patients = [item.study.patient for item in items]
    first = {text: image for image, text in reversed(list(enumerate(own)))}
    of_text = [patients[first[text]] for text in range(texts)]
    rows = []
    for model, (images, sentences) in embedded.items():
        for direction, ranks, who in (
            ("image to text", text_ranks(images, sentences, numbers), patients),
            ("text to image", image_ranks(images, sentences, numbers), of_text),
        ):
            rows.append({"model": model, "direction": direction, "metrics": _recalls(ranks, who, config)})
    return {
        "images": len(own),
        "texts": texts,
        "patients": len(set(patients)),
        "rows": rows,
        "chance": _chance(numbers, texts),
    }


def text_ranks(images: Float32s, texts: Float32s, own: Ints) -> Ints:
    """Rank [n] of each image's own text among all texts, from 1."""
    ranks = []
    for start, cosines in _blocks(images, texts):
        right = np.take_along_axis(cosines, own[start : start + len(cosines), None], axis=1)
        ranks.append((cosines >= right).sum(1))
    return np.concatenate(ranks)


def image_ranks(images: Float32s, texts: Float32s, own: Ints) -> Ints:
    """Rank [t] of the first image with each text among all images, from 1."""
    ranks = []
    for start, cosines in _blocks(texts, images):
        right = own[None] == np.arange(start, start + len(cosines))[:, None]
        best = np.where(right, cosines, -np.inf).max(1, keepdims=True)
        ranks.append(1 + ((cosines >= best) & ~right).sum(1))
    return np.concatenate(ranks)


def _blocks(queries: Float32s, others: Float32s) -> Iterator[tuple[int, Float32s]]:
    """The number of the first query of each block, and its cosines with all others."""
    size = max(1, CELLS // max(1, len(others)))
    for start in range(0, len(queries), size):
        yield start, queries[start : start + size] @ others.T


def _recalls(ranks: Ints, patients: list[str], config: Config) -> dict[str, Any]:
    hits = {k: (ranks <= k).astype(np.float64) for k in RANKS}
    return {f"recall@{k}": asdict(bootstrap.mean(hits[k], patients, config.eval.bootstrap, config.seed)) for k in RANKS}


def _chance(own: Ints, texts: int) -> dict[str, dict[str, float]]:
    """Recall of a random order: k of t texts are drawn; k of n images, none of them one of the r with the text."""
    counts, n = np.bincount(own, minlength=texts), len(own)
    missed: Float64s = np.ones(texts)
    found = {}
    for drawn in range(max(RANKS)):
        missed = missed * np.clip(n - counts - drawn, 0, None) / max(1, n - drawn)
        if drawn + 1 in RANKS:
            found[drawn + 1] = float(1 - missed.mean())
    return {
        "image to text": {f"recall@{k}": min(1.0, k / texts) for k in RANKS},
        "text to image": {f"recall@{k}": found[k] for k in RANKS},
    }


def table(document: dict[str, Any]) -> str:
    """The figures as text: a line for each model and direction, and one for chance."""
    heads = [f"recall@{k}" for k in RANKS]
    lines = [("retrieval", "model", *(f"{head} [95 %]" for head in heads), "queries", "among")]
    sizes = {"image to text": ("images", "texts"), "text to image": ("texts", "images")}
    for row in document["rows"]:
        asked, among = (str(document[name]) for name in sizes[row["direction"]])
        figures = (format_estimate(row["metrics"][head]) for head in heads)
        lines.append((row["direction"], row["model"], *figures, asked, among))
    for direction, chance in document["chance"].items():
        lines.append((direction, "chance", *(f"{chance[head]:.3f}" for head in heads), "", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def examples(
    items: list[Item], texts: list[list[str]], own: list[int], image_embeddings: Float32s, text_embeddings: Float32s
) -> dict[str, Any]:
    """Nearest neighbours by cosine of unit embeddings [n, D] and [t, D], as a JSON object.

    The queries are chosen without looking at results: in shard order the first image of each BI-RADS category, or of
    each density if the archive has no BI-RADS.
    """
    queries = _first_of_each(items)
    by_text = [image_embeddings @ text_embeddings[own[i]] for i in queries]  # [n] each
    by_image = [text_embeddings @ image_embeddings[i] for i in queries]  # [t] each
    return {
        "texts": [
            {
                "sentences": texts[own[i]],
                "results": [
                    {
                        "image": items[j].key,
                        "cosine": float(cosines[j]),
                        "facts": facts(items[j].view),
                        "same_text": own[j] == own[i],
                    }
                    for j in _best(cosines, IMAGES)
                ],
            }
            for i, cosines in zip(queries, by_text, strict=True)
        ],
        "images": [
            {
                "image": items[i].key,
                "facts": facts(items[i].view),
                "results": [
                    {"sentences": texts[t], "cosine": float(cosines[t]), "own": own[i] == t}
                    for t in _best(cosines, TEXTS)
                ],
            }
            for i, cosines in zip(queries, by_image, strict=True)
        ],
    }


def facts(view: View) -> list[str]:
    """Side, view, labels and findings of an image, in short."""
    labels = view.labels
    shown = [f"{view.laterality} {view.view}"]
    if labels.density is not None:
        shown.append(f"density {labels.density}")
    if labels.birads is not None:
        shown.append(f"BI-RADS {labels.birads}")
    if labels.pathology is not None or labels.cancer is not None:
        shown.append(labels.pathology or ("cancer" if labels.cancer else "no cancer"))
    return shown + [sentence.removeprefix("Findings: ").removesuffix(".") for sentence in report_text.findings(view)]


def _best(cosines: Float32s, count: int) -> list[int]:
    return np.argsort(-cosines, kind="stable")[:count].tolist()


def _first_of_each(items: list[Item]) -> list[int]:
    first: dict[object, int] = {}
    by_birads = any(item.view.labels.birads is not None for item in items)
    for i, item in enumerate(items):
        labels = item.view.labels
        value = labels.birads if by_birads else labels.density
        if value is not None:
            first.setdefault(value, i)
    return [first[value] for value in sorted(first, key=str)][:QUERIES] or list(range(min(QUERIES, len(items))))
