"""AdamW's parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from mama.config import LossConfig, OptimConfig

# Moved by the local term alone: the global feature is read in front of the last norm.
LOCAL_MODULES = ("vision.norm.", "patch_head.", "sentence_head.", "local_scale.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in up to four groups: local or not, decayed or not.

    Vectors and scalars (norms, biases, scales) are not decayed. The local heads stand apart because
    decay and Adam would move them, or would have nothing to say, while their term weighs nothing.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(LOCAL_MODULES), parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "local": local}
        for (local, decayed), parameters in groups.items()
    ]


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr` at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    last = steps - 1
    progress = (step - config.warmup_steps) / (last - config.warmup_steps) if last > config.warmup_steps else 1.0
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_rates(groups: Iterable[dict[str, Any]], step: int, steps: int, optim: OptimConfig, loss: LossConfig) -> float:
    """Give every group its rate for `step`: 0 for the local heads before their term starts."""
    rate = rate_at(step, steps, optim)
    for group in groups:
        group["lr"] = 0.0 if group["local"] and step < loss.local_start else rate
    return rate


def forget_idle_steps(optimizer: Any) -> None:
    """Start Adam's step count of the local heads anew; call it at the step at which their term starts.

    The steps at gradient 0 have used up the bias correction of the moments: without this the first
    updates would be several times the learning rate.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["local"] else ():
            if parameter in optimizer.state:
                optimizer.state[parameter]["step"].zero_()
