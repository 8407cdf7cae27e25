"""The learning rate of a step, as `OptimConfig` describes it. Without PyTorch: a probe of the evaluation has it too."""

from __future__ import annotations

import math

from mama.settings.schema import OptimConfig


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of `step`: linear warm-up, then a cosine from `lr` to `min_lr` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    last = steps - 1
    progress = (step - config.warmup_steps) / (last - config.warmup_steps) if last > config.warmup_steps else 1.0
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
