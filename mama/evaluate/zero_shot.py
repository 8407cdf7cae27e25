"""Zero-shot classification: predict the class whose prompt ensemble is nearest to the image.

Source: CLIP (Radford et al. 2021, section 3.1). Letters: n images, K classes, D shared width.
"""

from __future__ import annotations

import numpy as np

from mama.evaluate.arrays import Float32s, Float64s


def class_embeddings(ensembles: list[Float32s]) -> Float32s:
    """Unit text embeddings of each class's prompts, [t_k, D] each -> their normalised means, [K, D]."""
    means = np.stack([texts.mean(0) for texts in ensembles])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def probabilities(images: Float32s, classes: Float32s, scale: float) -> Float64s:
    """Softmax over the classes of scale x cosine: unit [n, D] and [K, D] -> [n, K]."""
    logits = scale * images.astype(np.float64) @ classes.astype(np.float64).T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
