"""Every tensor of the model of a checkpoint, one at a time: trained ones from it, frozen ones from their base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.export.adapters import base_digest, merges
from mama.export.frozen_weights import FrozenWeights
from mama.export.parts import parts
from mama.model import attention
from mama.model.mama_model import build
from mama.run import checkpoints
from mama.run.model_state import is_finite
from mama.settings.schema import Config

CPU = torch.device("cpu")


class ModelTensors:
    """The tensors of the run of `config` at `checkpoint`; `model` has their names and shapes, on the meta device.

    Raises `ConfigError` if the checkpoint is of another model.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, checkpoint: Path) -> None:
        kernel = attention.choose("sdpa", CPU)
        self.model = build(config, tokenizer, kernel, empty=True)
        self.names = parts(self.model)
        self.checkpoint = checkpoint
        self.trained = checkpoints.stored_weights(self.model, checkpoint)
        self.frozen = FrozenWeights(config, tokenizer, checkpoint, self.model, kernel)
        self.merges = merges(self.model.text)
        state = self.model.state_dict(keep_vars=True)
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.first = {name: first.get(id(tensor), name) for name, tensor in state.items()}  # of names of one tensor

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model, in fp32. Raises `ConfigError` if it is damaged or not that of training."""
        name = self.first[name]
        if name not in self.trained:
            return self.frozen.read(name)
        stored = self.trained[name]
        tensor = stored.read()
        if not is_finite(tensor):
            raise ConfigError(f"{stored.path}: {name} is not finite; remove {self.checkpoint} to take the one before")
        return tensor.float()

    def merged(self, name: str) -> Tensor:
        """A tensor of the model without adapters: what they change in it is in it."""
        tensor = self.read(name)
        merge = self.merges.get(self.first[name])
        return merge(tensor, self.read) if merge else tensor

    def base_digest(self) -> str:
        """`adapters.base_digest` of the frozen tensors of the language model."""
        frozen = {name: digest for name, digest in self.frozen.digests.items() if name.startswith("text.")}
        return base_digest(self.model.text, frozen, self.read)
