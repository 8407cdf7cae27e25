"""The optimizer of a fine-tuning: parameter groups with a learning rate for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mama.model.classifier import Classifier
from mama.settings.rates import rate_at
from mama.settings.schema import Config
from mama.train.deepspeed_engine import adamw


def optimizer_of(model: Classifier, config: Config) -> torch.optim.Optimizer:
    """PyTorch's AdamW, or its SGD without momentum, over `layer_groups`."""
    groups = layer_groups(model, config.optim.weight_decay)
    if config.finetune.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.optim.lr)
    return adamw(groups, config)


def layer_groups(model: Classifier, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters by layer, and by whether they are decayed: matrices are.

    `layer` counts the layers above, as `Classifier.depths` does.
    """
    depths = model.depths()
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name], parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "tower": "vision" if depth else "heads",
            "term": None,
            "layer": depth,
        }
        for (depth, decayed), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def set_layer_rates(groups: Iterable[dict[str, Any]], step: int, config: Config) -> dict[str, float]:
    """Set every rate for `step`: that of the classifier times `finetune.layer_decay` for each layer from it down.

    Returns the highest and the lowest.
    """
    rate = rate_at(step, config.train.steps, config.optim)
    rates = []
    for group in groups:
        group["lr"] = rate * config.finetune.layer_decay ** group["layer"]
        rates.append(group["lr"])
    return {"lr/highest": max(rates), "lr/lowest": min(rates)}
