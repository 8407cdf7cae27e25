"""Linear probes: logistic regression on frozen features, or on the plain intensities of an image.

Letters: n images, d features, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mama.metrics import Floats, Ints

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn: the smaller, the stronger
FOLDS = 3
PERCENTILES = np.linspace(0, 100, 31)


def fit(features: Floats, labels: Ints, patients: list[str], seed: int) -> Pipeline:
    """Standardised features [n, d] and labels [n] -> a classifier that weighs all classes alike.

    The penalty is the one with the smallest balanced log loss in a cross-validation over the
    patients of the training split; held-out images have no say in it.
    """
    losses = {c: 0.0 for c in PENALTIES}
    folds = min(FOLDS, min(len({patients[i] for i in np.flatnonzero(labels == k)}) for k in np.unique(labels)))
    if folds > 1:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train, test in splitter.split(features, labels, patients):
            for c in PENALTIES:
                losses[c] += _balanced_log_loss(_classifier(c).fit(features[train], labels[train]), features[test], labels[test])
    best = min(PENALTIES, key=lambda c: losses[c])
    return _classifier(best).fit(features, labels)


def probabilities(classifier: Pipeline, features: Floats, classes: int) -> Floats:
    """[n, d] -> [n, K]; a class that training did not show has probability 0."""
    shares = np.zeros((len(features), classes))
    shares[:, classifier.classes_] = classifier.predict_proba(features)
    return shares


def intensity_percentiles(image: NDArray[np.uint8]) -> Floats:
    """31 evenly spaced percentiles, 0 to 100, of all stored pixels of uint8 [h, w], air included.

    The smallest grey value that at least the asked share of the pixels does not exceed (NumPy's
    `inverted_cdf`), from the histogram.
    """
    counts = np.bincount(image.ravel(), minlength=256).cumsum()
    ranks = np.maximum(np.ceil(PERCENTILES / 100 * image.size), 1)
    return np.searchsorted(counts, ranks).astype(np.float64)


def _classifier(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=500))


def _balanced_log_loss(classifier: Pipeline, features: Floats, labels: Ints) -> float:
    shares = probabilities(classifier, features, int(max(labels.max(), classifier.classes_.max())) + 1)
    losses = -np.log(np.clip(shares[np.arange(len(labels)), labels], 1e-6, 1))
    return float(np.mean([losses[labels == k].mean() for k in np.unique(labels)]))
