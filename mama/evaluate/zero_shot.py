"""Zero-shot classification: an image is of the class whose texts lie nearest.

Source: CLIP (Radford et al. 2021, section 3.1). Letters: n images, K classes, D shared width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mama.evaluate.metrics import Floats


def class_embeddings(texts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Unit text embeddings of each class, [t_k, D] -> their normalised mean, [K, D]."""
    means = np.stack([variants.mean(0) for variants in texts])
    unit: NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit


def probabilities(images: NDArray[np.float32], classes: NDArray[np.float32], scale: float) -> Floats:
    """Softmax over the classes of scale x cosine: unit [n, D] and [K, D] -> [n, K]."""
    logits = scale * images.astype(np.float64) @ classes.astype(np.float64).T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    shares: Floats = weights / weights.sum(1, keepdims=True)
    return shares
