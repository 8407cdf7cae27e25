"""The settings of a run that trains the tiny model on the shards of `cohort`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mama.settings.schema import Config, DataConfig, LossConfig, OptimConfig
from tests.support.cohort import SIZE
from tests.support.tiny_model import tiny

STEPS = 8
LOCAL_START = 3


def config_of(folder: Path, name: str, steps: int = STEPS) -> Config:
    """Two ranks, with dropout and every random change of the images: a resume must draw the same again."""
    base = tiny(
        2, steps=steps, global_batch=8, micro_batch=2, save_every=2, log_every=1, keep_checkpoints=20, validate_every=3,
        zero_stage=3,
    )  # fmt: skip
    return replace(
        base,
        name=name,
        runs=str(folder / "runs"),
        data=DataConfig(shards=[str(folder / "shards")], image_size=SIZE, max_tokens=64, workers=1),
        text=replace(base.text, config=base.text.config | {"vocab_size": 300, "resid_pdrop": 0.1}, lora_dropout=0.1),
        loss=LossConfig(local_start=LOCAL_START, positives="text"),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
    )
