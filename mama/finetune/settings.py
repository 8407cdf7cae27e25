"""The settings of a fine-tuning, in the sections in which the training loop reads them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mama.evaluate.fine_tuned import Tuning
from mama.evaluate.fractions import seed_of
from mama.settings.schema import Config, TextConfig, VisionConfig


def settings_of_group(config: Config, model: Path, place: Path) -> Config:
    """The settings with which the ranks meet in the folder `place`; `model` is that of the consolidated model.

    Raises `ConfigError` if the ranks cannot share `finetune.batch`.
    """
    own = config.finetune
    ranks = int(os.environ.get("WORLD_SIZE", config.train.ranks))
    share = own.share(ranks)
    train = replace(
        config.train,
        steps=own.steps,
        global_batch=own.batch,
        micro_batch=max(n for n in range(1, share + 1) if share % n == 0 and n <= own.micro_batch),
        grad_cache=False,
        save_every=own.save_every,
        validate_every=own.validate_every,
    )
    optim = replace(
        config.optim,
        lr=own.lr,
        min_lr=own.min_lr,
        weight_decay=own.weight_decay,
        warmup_steps=own.warmup_steps,
        clip_norm=own.clip_norm,
    )
    # Of the towers only sizes are read: the weights are those of `model`.
    model = model.absolute()
    towers = VisionConfig(model=str(model / "vision")), TextConfig(model=str(model / "text"), tune="frozen")
    return replace(
        config, name=place.name, runs=str(place.parent), train=train, optim=optim, vision=towers[0], text=towers[1]
    )


def settings_of_one(config: Config, tuning: Tuning, model: Path, place: Path) -> Config:
    """The settings of one fine-tuning, whose run folder is its own folder in `place`."""
    group = settings_of_group(config, model, place)
    return replace(group, name=tuning.name, runs=str(place), seed=seed_of(config.seed, tuning.draw))
