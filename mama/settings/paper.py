"""The MaMA paper's own fine-tuning, in place of `finetune` where `eval.protocol` is paper. Without PyTorch."""

from __future__ import annotations

from dataclasses import asdict, replace

from mama.errors import ConfigError
from mama.settings.schema import Config, FinetuneConfig

TUNING = FinetuneConfig(
    steps=8000,
    batch=72,  # 36 x 2
    optimizer="sgd",
    lr=5e-4,
    min_lr=1e-5,
    warmup_steps=100,
    weight_decay=1e-3,
    layer_decay=1.0,
    clip_norm=0.0,
    sampling="balanced",
)
OPEN = ("micro_batch", "save_every")  # settings of `finetune` that decide nothing


def resolved(config: Config) -> Config:
    """The settings with the paper's own fine-tuning, if they ask for its protocol.

    Raises `ConfigError` if they have another setting of `finetune` as well.
    """
    if config.eval.protocol == "standard":
        return config
    given, plain, own = asdict(config.finetune), asdict(FinetuneConfig()), asdict(TUNING)
    for name, value in given.items():
        if name not in OPEN and value not in (plain[name], own[name]):
            raise ConfigError(f"finetune.{name}: {value}, but eval.protocol=paper has {own[name]}; leave it out")
    return replace(config, finetune=replace(TUNING, **{name: given[name] for name in OPEN}))
