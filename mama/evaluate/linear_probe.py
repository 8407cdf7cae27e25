"""Linear probes: logistic regression on frozen features, or on the intensities of an image.

Letters: n images, d features, K classes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mama.evaluate.arrays import Float64s, Ints

Features = NDArray[np.floating[Any]]

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn: the smaller, the stronger
FOLDS = 3
PERCENTILES = np.linspace(0, 100, 31)


def fit(features: Features, labels: Ints, patients: list[str], seed: int) -> Pipeline:
    """Fit on features [n, d] and labels [n] of at least two classes, which get equal weight.

    The penalty is the one with the smallest balanced log loss in a cross-validation over the patients of the training
    split; held-out images are not used. With too few patients for that it is the middle one.
    """
    by_class = sorted(len({patients[i] for i in np.flatnonzero(labels == k)}) for k in np.unique(labels))
    if by_class[-2] < FOLDS:  # a fold might hold one class only
        return _classifier(PENALTIES[len(PENALTIES) // 2]).fit(features, labels)
    losses = dict.fromkeys(PENALTIES, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # rare classes are in some folds only
        folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(features, labels, patients))
    for train, test in folds:
        for c in PENALTIES:
            fitted = _classifier(c).fit(features[train], labels[train])
            losses[c] += _balanced_log_loss(fitted, features[test], labels[test])
    return _classifier(min(PENALTIES, key=lambda c: losses[c])).fit(features, labels)


def probabilities(classifier: Pipeline, features: Features, classes: int) -> Float64s:
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


def _classifier(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=500))


def _balanced_log_loss(classifier: Pipeline, features: Features, labels: Ints) -> float:
    shares = probabilities(classifier, features, int(max(labels.max(), classifier.classes_.max())) + 1)
    losses = -np.log(np.clip(shares[np.arange(len(labels)), labels], 1e-6, 1))
    return float(np.mean([losses[labels == k].mean() for k in np.unique(labels)]))
