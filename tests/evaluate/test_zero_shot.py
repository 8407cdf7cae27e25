from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mama.evaluate.zero_shot import by_template, class_embeddings, probabilities


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


def test_the_table_by_template_is_zero_shot_with_the_texts_of_each_alone() -> None:
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(7, 8)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    labels = rng.integers(0, 2, 40)
    names = [["a", "b", "b"], ["b", "a", "c", "a"]]  # the first class lacks "c"
    rows = by_template(images, labels, [texts[:3], texts[3:]], names, 10.0, True)
    own = {"all, averaged": ([0, 1, 2], [3, 4, 5, 6]), "a": ([0], [4, 6]), "b": ([1, 2], [3])}
    assert [row["template"] for row in rows] == list(own)
    for row, (negative, positive) in zip(rows, own.values(), strict=True):
        means = [texts[numbers].mean(0) for numbers in (positive, negative)]
        scores = [images @ (mean / np.linalg.norm(mean)) for mean in means]
        assert row["auc"] == pytest.approx(roc_auc_score(labels, scores[0] - scores[1]))
        assert row["texts"] == len(negative) + len(positive)
    assert {row["auc"] for row in by_template(images, labels * 0, [texts[:3], texts[3:]], names, 10.0, True)} == {None}
