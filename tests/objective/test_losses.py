"""The terms of the objective against loops in float64 that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mama.objective import losses
from mama.objective.local_alignment import alignment_scores
from mama.settings.schema import LossConfig


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(scores: np.ndarray, positives: list[list[int]]) -> float:
    """Mean over rows of -mean over positives of log softmax."""
    total = 0.0
    for row, own in zip(scores, positives, strict=True):
        log_sum = np.log(np.exp(row - row.max()).sum()) + row.max()
        total += np.mean([log_sum - row[j] for j in own])
    return total / len(scores)


def symmetric(scores: np.ndarray, rows: list[list[int]]) -> float:
    columns = [[i for i, own in enumerate(rows) if j in own] for j in range(len(rows))]
    return (cross_entropy(scores, rows) + cross_entropy(scores.T, columns)) / 2


def diagonal(n: int) -> list[list[int]]:
    return [[i] for i in range(n)]


def t(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


def test_clip_loss_is_symmetric_info_nce() -> None:
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 7, 16), unit(rng, 7, 16)
    got = losses.clip_loss(t(images), t(texts), torch.tensor(14.0), torch.eye(7, dtype=torch.float64))
    assert got.item() == pytest.approx(symmetric(14 * images @ texts.T, diagonal(7)), abs=1e-12)


def test_equal_texts_count_as_positives_of_each_other() -> None:
    rng = np.random.default_rng(1)
    images, texts = unit(rng, 5, 8), unit(rng, 5, 8)
    targets = losses.positives(torch.tensor([3, 9, 3, 4, 3]), same_text=True).double()
    own = [[0, 2, 4], [1], [0, 2, 4], [3], [0, 2, 4]]
    got = losses.clip_loss(t(images), t(texts), torch.tensor(5.0), targets)
    assert got.item() == pytest.approx(symmetric(5 * images @ texts.T, own), abs=1e-12)
    assert torch.equal(losses.positives(torch.tensor([3, 9, 3]), same_text=False), torch.eye(3))


def test_view_loss_is_nt_xent_over_all_other_views() -> None:
    rng = np.random.default_rng(2)
    v, w = unit(rng, 6, 8), unit(rng, 6, 8)
    both = np.concatenate([v, w])
    total = 0.0
    for i in range(12):
        scores = both @ both[i] / 0.5
        others = [j for j in range(12) if j != i]
        total += np.log(np.exp(scores[others]).sum()) - scores[(i + 6) % 12]
    assert losses.view_loss(t(v), t(w), 0.5).item() == pytest.approx(total / 12, abs=1e-12)


def naive_alignment(sentences: list[np.ndarray], patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    texts, images = len(sentences), len(patches)
    visual, textual = np.zeros((texts, images)), np.zeros((texts, images))
    for i in range(texts):
        for j in range(images):
            cosines = sentences[i] @ patches[j].T
            visual[i, j] = np.mean([max(row) for row in cosines])
            textual[i, j] = np.mean([max(column) for column in cosines.T])
    return visual, textual


def test_local_loss_ignores_padding_and_matches_the_loop() -> None:
    rng = np.random.default_rng(3)
    counts, most = [3, 1, 4, 2], 4
    sentences = [unit(rng, n, 8) for n in counts]
    patches = unit(rng, 4, 10, 8)
    padded = np.stack([np.concatenate([s, unit(rng, most - len(s), 8)]) for s in sentences])  # garbage as padding
    mask = torch.tensor([[k < n for k in range(most)] for n in counts])
    visual, textual = naive_alignment(sentences, patches)
    got_visual, got_textual = alignment_scores(t(padded), mask, t(patches), 3)
    np.testing.assert_allclose(got_visual.numpy(), visual, atol=1e-12)
    np.testing.assert_allclose(got_textual.numpy(), textual, atol=1e-12)
    got = losses.local_loss(
        t(padded), mask, t(patches), torch.tensor(9.0), torch.eye(4, dtype=torch.float64), LossConfig()
    )
    expected = (symmetric(9 * visual, diagonal(4)) + symmetric(9 * textual, diagonal(4))) / 2
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_retrieval_accuracy_counts_nearest_positives() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[2], images[1]])
    to_text, to_image = losses.retrieval_accuracy(images, texts, torch.eye(3))
    assert to_text.item() == pytest.approx(1 / 3)
    assert to_image.item() == pytest.approx(1 / 3)
