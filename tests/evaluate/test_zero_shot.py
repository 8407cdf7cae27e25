from __future__ import annotations

import numpy as np
import torch

from mama.evaluate.zero_shot import class_embeddings, probabilities


def test_probabilities_are_a_softmax_of_scaled_cosines() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(7, 16)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = [rng.normal(size=(count, 16)).astype(np.float32) for count in (1, 4, 2)]
    texts = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in texts]
    classes = class_embeddings(texts)
    assert np.allclose(np.linalg.norm(classes, axis=1), 1)
    assert np.allclose(classes[0], texts[0][0])
    expected = torch.tensor(images) @ torch.tensor(np.stack([t.mean(0) / np.linalg.norm(t.mean(0)) for t in texts])).T
    assert np.allclose(probabilities(images, classes, 100.0), (100 * expected.double()).softmax(1).numpy(), atol=1e-5)
