"""How likely each image is to be drawn, where a run does not simply see each once an epoch."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mama.data.images import Images
from mama.settings.schema import ConfigError, DataConfig
from shards.read.labels import facts_of, labels_of
from shards.schema import DENSITIES

UNLABELLED = -1


def chances(images: Images, config: DataConfig) -> NDArray[np.float64] | None:
    """The probability of each image to be the anchor of a pair, [n]; None where each is drawn once an epoch.

    With `shard_weights` a set is drawn by its weight, without them all sets are one. With `balance` then each class
    that the set has is equally likely, and each image of the class; images without the label are not drawn, nor are
    those that `allowed` leaves out.
    """
    if config.balance == "none" and not config.shard_weights:
        return None
    counts = [sum(reader.view_counts) for reader in images.readers]
    sets = np.repeat(np.arange(len(counts)), counts)
    classes = np.zeros(len(images), np.int64) if config.balance == "none" else _classes(images, config)
    classes = np.where(allowed(images, config), classes, UNLABELLED)
    if (classes == UNLABELLED).all():
        raise ConfigError(f"data.balance: {config.balance}, a label that no image has beside those of data.require")
    if not config.shard_weights:
        return _even(classes)
    chance = np.zeros(len(images))
    for number, weight in enumerate(config.shard_weights):
        of_set = sets == number
        if weight and not (classes[of_set] != UNLABELLED).any():
            what = "training image" if config.balance == "none" else f"training image with the label {config.balance}"
            raise ConfigError(
                f"data.shard_weights: {weight} for {config.shards[number]}, which has no {what}; give it the weight 0"
            )
        chance[of_set] = weight / sum(config.shard_weights) * _even(classes[of_set])
    return chance


def allowed(images: Images, config: DataConfig) -> NDArray[np.bool_]:
    """Which images have all facts that `config.require` names, [n]; `ConfigError` where none has."""
    if not config.require:
        return np.ones(len(images), np.bool_)
    facts = [fact for reader in images.readers for fact in facts_of(reader, config.cache_folder)]
    known = [asdict(labels) | {"reason": reason} for labels, reason in facts]
    found = np.array([all(fact[name] is not None for name in config.require) for fact in known])
    if not found.any():
        raise ConfigError(f"data.require: no training image has {' and '.join(config.require)}; require less")
    return found


def _classes(images: Images, config: DataConfig) -> NDArray[np.int64]:
    """The class of each image by its label `config.balance`, [n]."""
    labels = [
        getattr(label, config.balance) for reader in images.readers for label in labels_of(reader, config.cache_folder)
    ]
    numbers: dict[object, int] = {None: UNLABELLED, **{density: n for n, density in enumerate(DENSITIES)}}
    classes = np.array([numbers[v] if v in numbers else int(v) for v in labels], np.int64)
    if (classes == UNLABELLED).all():
        raise ConfigError(f"data.balance: {config.balance}, a label that no training image has; choose another or none")
    return classes


def _even(classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities with which each class is drawn as often as another; 0 for what is unlabelled."""
    kinds, kind, count = np.unique(classes, return_inverse=True, return_counts=True)
    known = kinds != UNLABELLED
    return (known / (count * max(1, known.sum())))[kind]
