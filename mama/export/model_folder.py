"""The model folder that `mama consolidate` writes: load it for inference, without DeepSpeed or peft."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model import attention
from mama.model.mama_model import MamaModel
from mama.model.towers import TextTower, VisionTower
from mama.run.files import check_digests, surviving
from mama.run.portable import WEIGHTS
from mama.settings.load import load


def is_bare(folder: Path) -> bool:
    """Whether a folder is a model folder by itself, and no run that holds one in model/."""
    return (folder / WEIGHTS).is_file()


def model_folder(run: Path) -> Path:
    """The model folder of a run, or `run` itself if it is one."""
    return run if is_bare(run) else surviving(run / "model")


def require_model(folder: Path) -> None:
    """Raise `ConfigError` if there is no model in `folder`."""
    if not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent}: no such run folder; train first")
    if not (folder / WEIGHTS).exists():
        raise ConfigError(f"{folder}: no {WEIGHTS}; run `mama consolidate` first")


def load_model(folder: Path, device: torch.device) -> tuple[MamaModel, Tokenizer]:
    """Load a consolidated model, in evaluation mode on `device`, and its tokenizer.

    Raises `ConfigError` if there is none, or if a file has changed since it was written.
    """
    folder = surviving(folder)
    require_model(folder)
    check_digests(folder, "run `mama consolidate` again")
    config = load(folder / "config.yaml")
    kernel = attention.choose(config.train.attention, device)
    vision, text = (
        AutoModel.from_config(
            AutoConfig.from_pretrained(folder / part, trust_remote_code=False),
            attn_implementation=kernel,
            trust_remote_code=False,
        )
        for part in ("vision", "text")
    )
    model = MamaModel(VisionTower(vision), TextTower(text, text.config.hidden_size), config.heads, config.loss)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(device).eval(), Tokenizer.load(folder / "tokenizer")
