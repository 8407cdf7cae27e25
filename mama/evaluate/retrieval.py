"""Retrieval examples among held-out images: the images nearest to a text, and the texts nearest to an image."""

from __future__ import annotations

from typing import Any

import numpy as np

from mama.data import report_text
from mama.data.held_out import Item
from mama.evaluate.arrays import Float32s
from mama.settings.schema import Style
from shards.schema import View

QUERIES, IMAGES, TEXTS = 6, 5, 3


def distinct_texts(items: list[Item], style: Style, tell_pathology: bool = False) -> tuple[list[list[str]], list[int]]:
    """The distinct texts of these images, all meta-information hidden, and for each image the index of its own."""
    hidden = frozenset(report_text.META)
    rows: dict[tuple[str, ...], int] = {}
    texts = (tuple(report_text.text(item.study, item.view, style, hidden, tell_pathology)) for item in items)
    own = [rows.setdefault(text, len(rows)) for text in texts]
    return [list(text) for text in rows], own


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
