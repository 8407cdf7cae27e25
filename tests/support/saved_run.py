"""A run folder as training leaves it, made without DeepSpeed: every trained weight is away from its first value."""

from __future__ import annotations

import torch

from mama.model.mama_model import build
from mama.run.model_state import buffers, digests, trained
from mama.run.run_folder import prepare
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.schema import Config
from tests.support.checkpoint_folder import saved


def save_run(config: Config, step: int = 3) -> None:
    """The run folder of `config`, with one checkpoint."""
    prepare(config)
    model = build(config, load_tokenizer(config.run_folder), "sdpa")
    random = torch.Generator().manual_seed(0)
    weights = {
        f"weight/{name}": (p + 0.1 * torch.randn(p.shape, generator=random)).detach()
        for name, p in trained(model).items()
    }
    running = {f"buffer/{name}": tensor for name, tensor in buffers(model).items()}
    saved(config.run_folder, step, tensors=weights | running, frozen=digests(model))
