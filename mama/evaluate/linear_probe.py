"""Linear probes: logistic regression on frozen features, or on the intensities of an image.

Letters: n images, d features, K classes.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mama.evaluate.arrays import Float64s, Ints
from mama.settings.rates import rate_at
from mama.settings.schema import FinetuneConfig, OptimConfig

log = logging.getLogger(__name__)

Features = NDArray[np.floating[Any]]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn: the smaller, the stronger
FOLDS = 3
ITERATIONS = 500  # at most, of the optimiser
PERCENTILES = np.linspace(0, 100, 31)


def fit(features: Features, labels: Ints, patients: list[str], seed: int) -> Pipeline:
    """Fit on features [n, d] and labels [n] of at least two classes, which get equal weight.

    The penalty is the one with the smallest balanced log loss in a cross-validation over the patients of the training
    split; held-out images are not used. With too few patients for that it is the middle one.
    """
    fitted = _fitted(_penalty(features, labels, patients, seed), features, labels)
    if fitted[-1].n_iter_.max() >= ITERATIONS:
        log.warning("linear probe on %d images: its optimiser was stopped after %d iterations", len(labels), ITERATIONS)
    return fitted


@dataclass(frozen=True)
class Softmax:
    """Multinomial logistic regression, with the attributes of scikit-learn's that are used here."""

    weights: Float64s  # [d, K]
    bias: Float64s  # [K]
    classes_: Ints  # [K]

    def predict_proba(self, features: Features) -> Float64s:
        """[n, d] -> [n, K]"""
        logits = features @ self.weights + self.bias
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(shares / shares.sum(1, keepdims=True), dtype=np.float64)


def fit_by_sgd(features: Features, labels: Ints, seed: int, tuning: FinetuneConfig) -> Softmax:
    """Fit on features [n, d], as they are, and labels [n] by stochastic gradient descent, from 0.

    Steps, batch, rates and weight decay (on the weights, as part of the gradient) are those of `tuning`; images are
    drawn with replacement, every class equally often.
    """
    kinds, kind, counts = np.unique(labels, return_inverse=True, return_counts=True)
    ends, rng = np.cumsum(1 / (counts[kind] * len(kinds))), np.random.default_rng(seed)
    weights, bias = np.zeros((features.shape[1], len(kinds))), np.zeros(len(kinds))
    rates = OptimConfig(lr=tuning.lr, min_lr=tuning.min_lr, warmup_steps=tuning.warmup_steps)
    for step in range(tuning.steps):
        rows = np.searchsorted(ends, rng.random(tuning.batch) * ends[-1], side="right")
        x = features[rows].astype(np.float64)
        error = Softmax(weights, bias, kinds).predict_proba(x)
        error[np.arange(tuning.batch), kind[rows]] -= 1
        rate = rate_at(step, tuning.steps, rates)
        weights -= rate * (x.T @ error / tuning.batch + tuning.weight_decay * weights)
        bias -= rate * error.mean(0)
    return Softmax(weights, bias, kinds.astype(np.int64))


def probabilities(classifier: Pipeline | Softmax, features: Features, classes: int) -> Float64s:
    """[n, d] -> [n, K]; a class that the training split lacks has probability 0."""
    shares = np.zeros((len(features), classes))
    shares[:, classifier.classes_] = classifier.predict_proba(features)
    return shares


def intensity_percentiles(image: NDArray[np.uint8]) -> Float64s:
    """31 evenly spaced percentiles, 0 to 100, of all stored pixels of uint8 [h, w], background included.

    As NumPy's `inverted_cdf`, computed from the histogram.
    """
    counts = np.bincount(image.ravel(), minlength=256).cumsum()
    ranks = np.maximum(np.ceil(PERCENTILES / 100 * image.size), 1)
    return np.searchsorted(counts, ranks).astype(np.float64)


def _penalty(features: Features, labels: Ints, patients: list[str], seed: int) -> float:
    by_class = sorted(len({patients[i] for i in np.flatnonzero(labels == k)}) for k in np.unique(labels))
    if by_class[-2] < FOLDS:  # a fold might hold one class only
        return PENALTIES[len(PENALTIES) // 2]
    losses = dict.fromkeys(PENALTIES, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # rare classes are in some folds only
        folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(features, labels, patients))
    for train, test in folds:
        for c in PENALTIES:
            fitted = _fitted(c, features[train], labels[train])
            losses[c] += _balanced_log_loss(fitted, features[test], labels[test])
    return min(PENALTIES, key=lambda c: losses[c])


def _fitted(c: float, features: Features, labels: Ints) -> Pipeline:
    regression = LogisticRegression(C=c, class_weight="balanced", max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # many fits: `fit` tells of the one that counts
        return make_pipeline(StandardScaler(), regression).fit(features, labels)


def _balanced_log_loss(classifier: Pipeline, features: Features, labels: Ints) -> float:
    shares = probabilities(classifier, features, int(max(labels.max(), classifier.classes_.max())) + 1)
    losses = -np.log(np.clip(shares[np.arange(len(labels)), labels], 1e-6, 1))
    return float(np.mean([losses[labels == k].mean() for k in np.unique(labels)]))
