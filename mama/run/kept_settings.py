"""Which settings of a run must stay when it is resumed. Without PyTorch, which is slow to import."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Settings, and whole sections of them, that may change when a run is resumed. Ranks and micro-batches decide how many
# negatives a pair has, unless train.grad_cache takes them from the whole step: a change is logged.
MAY_CHANGE = (
    *("pack", "eval", "finetune", "runs", "data.workers", "data.cache", "data.max_corrupt"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.validate_every", "train.max_skips"),
    *("train.ranks", "train.micro_batch", "train.zero_stage", "train.offload"),
    *("train.attention", "train.activation_checkpointing", "train.compile", "train.timeout", "train.patience"),
    *("train.oversubscribe",),
)


def changed_setting(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return the first dotted key that differs and is not in `MAY_CHANGE`; both arguments are flat settings."""
    keys = sorted(before.keys() | now.keys())
    return next((key for key in keys if before.get(key) != now.get(key) and not is_among(key, MAY_CHANGE)), None)


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys such as `train.steps`; an empty dictionary stays a value."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def is_among(key: str, names: Iterable[str]) -> bool:
    """Whether the dotted `key` is one of `names` or within a section that is, as `pack.root` is within `pack`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
