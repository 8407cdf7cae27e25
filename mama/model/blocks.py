"""Transformer blocks of the towers in training: compiled, with activation checkpointing."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mama.model.backbones import blocks_of
from mama.model.mama_model import MamaModel
from mama.settings.schema import TrainConfig

log = logging.getLogger(__name__)


def prepare_blocks(model: MamaModel, config: TrainConfig, device: torch.device) -> None:
    """Compile and checkpoint the blocks of both towers according to `config`; in evaluation they run unchanged.

    The image tower's blocks are compiled: norms, LayerScale, residuals and activations fuse into a few kernels
    (TorchInductor; Ansel et al. 2024, "PyTorch 2"), and as all images have one size, one compilation serves all
    blocks; two where rows differ in length (`vision.tokens`), the second for any length. The language model's are not:
    its texts differ in length, and compiled with dropout its forward pass was slower (docs/benchmarks.md). With
    activation checkpointing only the input of a block is kept for the backward pass; `auto` must have been decided
    (`mama.train.capacity`).
    """
    prepare_image_tower(model.vision, config, device)
    _prepare(model.text, False, config)


def prepare_image_tower(tower: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """As `prepare_blocks`, of the image tower alone."""
    obstacle = _obstacle(config, device)
    if config.compile:
        log.info("blocks of the image tower: %s", f"not compiled ({obstacle})" if obstacle else "compiled")
    _prepare(tower, config.compile and not obstacle, config)


def _prepare(tower: nn.Module, compiled: bool, config: TrainConfig) -> None:
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for block in blocks_of(tower):
        kind = type(block)
        if kind not in kinds:
            kinds[kind] = _trained(kind, compiled, config.activation_checkpointing is True)
        block.__class__ = kinds[kind]


def _obstacle(config: TrainConfig, device: torch.device) -> str | None:
    """Why blocks cannot be compiled here; None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if config.zero_stage == 3:
        return "ZeRO stage 3 gathers weights inside of them"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # where Triton looks
    if not any(map(shutil.which, compilers)):
        return f"there is no C compiler: {' and '.join(compilers)} not found"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers are not installed"
    return None


def _trained(kind: type[nn.Module], compiled: bool, checkpointed: bool) -> type[nn.Module]:
    """A subclass of the block class `kind` that is compiled or checkpointed in training.

    Checkpointing wraps the compiled block; compiling the checkpointed block failed in PyTorch 2.11.
    """
    plain: Any = kind.forward
    forward: Any = torch.compile(plain) if compiled else plain

    class Block(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if not self.training:
                return plain(self, *args, **kwargs)
            if checkpointed:
                return checkpoint(partial(forward, self), *args, use_reentrant=False, **kwargs)
            return forward(self, *args, **kwargs)

    Block.__name__ = kind.__name__
    return Block
