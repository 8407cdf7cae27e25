"""AdamW's parameter groups and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from mama.objective.losses import first_steps
from mama.settings.rates import rate_at
from mama.settings.schema import LossConfig, OptimConfig

# Parameters that one term alone trains. The global feature is taken before the image tower's last norm.
TERMS = {
    "view": ("view_head.",),
    "local": ("vision.norm.", "patch_head.", "sentence_head.", "local_scale."),
}
TOWERS = {"vision.": "vision", "text.": "text"}


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: Literal["matrices", "all"] = "matrices"
) -> list[dict[str, Any]]:
    """Group trainable parameters by tower (`vision`, `text`, `heads`), by the term that alone trains them, and decay.

    Vectors and scalars (norms, biases, scales) are decayed only with `decay="all"`. The heads of a term have groups of
    their own, since Adam and weight decay would move them even while their term has weight 0.
    """
    groups: dict[tuple[str, str | None, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            term = next((term for term, prefixes in TERMS.items() if name.startswith(prefixes)), None)
            tower = next((tower for prefix, tower in TOWERS.items() if name.startswith(prefix)), "heads")
            groups.setdefault((tower, term, decay == "all" or parameter.ndim >= 2), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "tower": tower, "term": term}
        for (tower, term, decayed), parameters in groups.items()
    ]


def set_rates(
    groups: Iterable[dict[str, Any]], step: int, steps: int, optim: OptimConfig, loss: LossConfig
) -> dict[str, float]:
    """Set the rate of every group for `step`, 0 for heads whose term has not started. Returns the rate by tower."""
    rate = rate_at(step, steps, optim)
    rates = {"vision": rate * optim.vision_rate, "text": rate * optim.text_rate, "heads": rate}
    for group in groups:
        group["lr"] = 0.0 if step < first_steps(loss).get(group["term"], 0) else rates[group["tower"]]
    return rates
