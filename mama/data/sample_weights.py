"""Sampling probabilities of the training images, for runs that do not see each image once an epoch."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from mama.data.images import Images
from mama.errors import ConfigError
from mama.settings.schema import DataConfig
from shards.read.labels import facts_of, labels_of
from shards.schema import DENSITIES

UNLABELLED = -1


def sampling_probabilities(images: Images, config: DataConfig) -> NDArray[np.float64] | None:
    """The probability [n] of each of n images to be the anchor of a pair; None if each is drawn once an epoch.

    1. With `shard_weights` a shard folder is drawn by its weight; without, all folders are one.
    2. With `balance` each class in the folder is equally likely, then each image of the class. Images without the
       label, and those without the facts that `require` names, have probability 0.

    Raises `ConfigError` if no image, or none of a weighted folder, is left.
    """
    if config.balance == "none" and not config.shard_weights:
        return None
    counts = [sum(reader.view_counts) for reader in images.readers]
    folders = np.repeat(np.arange(len(counts)), counts)
    classes = np.zeros(len(images), np.int64) if config.balance == "none" else _classes(images, config)
    classes = np.where(usable_images(images, config), classes, UNLABELLED)
    if (classes == UNLABELLED).all():
        raise ConfigError(f"data.balance: no image with the facts of data.require has the label {config.balance}")
    if not config.shard_weights:
        return _even(classes)
    probabilities = np.zeros(len(images))
    for number, weight in enumerate(config.shard_weights):
        own = folders == number
        if weight and not (classes[own] != UNLABELLED).any():
            what = "training image" if config.balance == "none" else f"training image with the label {config.balance}"
            raise ConfigError(
                f"data.shard_weights: {weight} for {config.shards[number]}, which has no {what}; give it the weight 0"
            )
        probabilities[own] = weight / sum(config.shard_weights) * _even(classes[own])
    return probabilities


def usable_images(images: Images, config: DataConfig) -> NDArray[np.bool_]:
    """Mask [n] of the images with all facts that `config.require` names. Raises `ConfigError` if there is none."""
    if not config.require:
        return np.ones(len(images), np.bool_)
    facts = [fact for reader in images.readers for fact in facts_of(reader, config.cache_folder)]
    known = [asdict(labels) | {"reason": reason} for labels, reason in facts]
    complete = np.array([all(fact[name] is not None for name in config.require) for fact in known])
    if not complete.any():
        raise ConfigError(f"data.require: no training image has {' and '.join(config.require)}; require less")
    return complete


def _classes(images: Images, config: DataConfig) -> NDArray[np.int64]:
    """The class [n] of each image by its label `config.balance`, `UNLABELLED` if it has none."""
    labels = [
        getattr(label, config.balance) for reader in images.readers for label in labels_of(reader, config.cache_folder)
    ]
    numbers: dict[object, int] = {None: UNLABELLED, **{density: n for n, density in enumerate(DENSITIES)}}
    classes = np.array([numbers[v] if v in numbers else int(v) for v in labels], np.int64)
    if (classes == UNLABELLED).all():
        raise ConfigError(f"data.balance: no training image has the label {config.balance}; choose another or none")
    return classes


def _even(classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probabilities that make all classes equally likely, and the images of a class; 0 for unlabelled ones."""
    kinds, kind, count = np.unique(classes, return_inverse=True, return_counts=True)
    known = kinds != UNLABELLED
    return (known / (count * max(1, known.sum())))[kind]
