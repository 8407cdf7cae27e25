"""Zero-shot classification: predict the class whose prompt ensemble is nearest to the image.

Source: CLIP (Radford et al. 2021, section 3.1). Letters: n images, K classes, D shared width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mama.evaluate import metrics
from mama.evaluate.arrays import Float32s, Float64s, Ints


def class_embeddings(ensembles: list[Float32s]) -> Float32s:
    """Unit text embeddings of each class's prompts, [t_k, D] each -> their normalised means, [K, D]."""
    means = np.stack([texts.mean(0) for texts in ensembles])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def probabilities(images: Float32s, classes: Float32s, scale: float) -> Float64s:
    """Softmax over the classes of scale x cosine: unit [n, D] and [K, D] -> [n, K]."""
    logits = scale * images.astype(np.float64) @ classes.astype(np.float64).T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def by_template(
    images: Float32s,
    labels: Ints,
    ensembles: list[Float32s],
    templates: list[list[str]],
    scale: float,
    binary: bool,
) -> list[dict[str, Any]]:
    """How much zero-shot depends on the wording: the AUC with all class prompts, then with those of one template alone.

    `ensembles` are the unit text embeddings [t_k, D] of each class, `templates` the template of each of those texts.
    A template that some class lacks is left out. `auc` is None where it is undefined.
    """
    common = [name for name in dict.fromkeys(templates[0]) if all(name in names for names in templates)]
    chosen = {"all, averaged": ensembles} | {
        name: [texts[np.array(names) == name] for texts, names in zip(ensembles, templates, strict=True)]
        for name in common
    }
    nobody = [""] * len(labels)  # there are no intervals
    rows = []
    for name, texts in chosen.items():
        scores = probabilities(images, class_embeddings(texts), scale)
        auc = metrics.measure(labels, scores, nobody, binary, 0, 0)["auc"].value
        rows.append({"template": name, "texts": sum(map(len, texts)), "auc": auc})
    return rows
