"""Frozen weights, one at a time: from the files of the model that training began with, proved by their digests.

A checkpoint has the digest of every frozen tensor. So a tensor may be looked for under any name: it is the right one if
its digest is. What is not found (a GGUF or .bin file, random weights) is taken from that tower, built as training did.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.export.parts import PEFT, parts
from mama.export.weight_files import INDEX, ONE, weights_in
from mama.model.backbones import build_backbone
from mama.model.heads import LogitScale
from mama.model.mama_model import MamaModel, build_tower
from mama.model.text_tower import TEXT_MODELS
from mama.run.checkpoint_marker import FROZEN
from mama.run.files import read_object
from mama.run.model_state import EMPTY, digest_of
from mama.run.tensor_file import Stored
from mama.settings.pretrained import locate
from mama.settings.schema import Config

log = logging.getLogger(__name__)

SMALL = 2**16  # elements of a tensor that may be all zeros or ones, as the parameters of norms begin
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of the first BERTs


class FrozenWeights:
    """The frozen tensors of `model`, which is on the meta device, as the run of `checkpoint` was trained with them."""

    def __init__(self, config: Config, tokenizer: Tokenizer, checkpoint: Path, model: MamaModel, kernel: str) -> None:
        self.config, self.tokenizer, self.checkpoint, self.kernel = config, tokenizer, checkpoint, kernel
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}
        names = parts(model)
        self.stored = {name: stored for part in (names.vision, names.text) for stored, name in part.items()}
        self.files = {part: files_of(getattr(config, part).model) for part in ("vision", "text")}
        self.built: tuple[str, dict[str, Tensor]] = ("", {})  # one tower at most
        self.digests = {n: digest for n, digest in read_object(checkpoint / FROZEN).items() if digest != EMPTY}
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad and p.numel()}
        if different := sorted(frozen ^ self.digests.keys()):
            raise self._other(different[0])

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model, in fp32. Raises `ConfigError` if it is not the one of the training."""
        if not self.shapes[name].numel():
            return torch.empty(self.shapes[name])
        for candidate in self._candidates(name) if name in self.digests else ():
            if digest_of(candidate) == self.digests[name]:
                return candidate
        tensor = self._tower(name.partition(".")[0]).get(name)
        if tensor is None or digest_of(tensor) != self.digests.get(name, digest_of(tensor)):
            raise self._other(name)
        return tensor

    def _candidates(self, name: str) -> Iterator[Tensor]:
        """Tensors in fp32 that may be the one of this name, the likely ones first."""
        shape = self.shapes[name]
        for stored in self._like(name):
            if stored.shape == tuple(shape):
                yield stored.read().float()
            elif name.startswith("text.") and len(shape) == 2 and stored.shape[1:] == tuple(shape[1:]):
                yield self._resized(stored)
        if shape.numel() <= SMALL:
            yield from (torch.zeros(shape), torch.ones(shape))
        if name == "local_scale.log":
            yield LogitScale(self.config.loss.initial_scale, self.config.loss.max_scale).log.detach()

    def _like(self, name: str) -> list[Stored]:
        """The tensors of the files whose name is this one or ends in it: a model with a head has a prefix there."""
        files = self.files.get(name.partition(".")[0], {})
        plain = PEFT.sub("", name.partition(".backbone.")[2])
        names = [word for word in (self.stored.get(name), plain) if word]
        names += [word.replace(new, old) for new, old in OLD_NAMES.items() for word in names if word.endswith(new)]
        ends = tuple(f".{word}" for word in names)
        return [stored for key, stored in files.items() if key in names or key.endswith(ends)]

    @torch.no_grad()
    def _resized(self, stored: Stored) -> Tensor:
        """The token embedding with a row for every token, as `build_text` makes it.

        New rows are random: the same ones, if nothing was drawn before them. Otherwise the digest is another one.
        """
        with torch.random.fork_rng([]):
            torch.manual_seed(self.config.seed)
            with torch.device("meta"):
                base = build_backbone("text", self.config.text, TEXT_MODELS, self.kernel, empty=True)
            embedding = base.get_input_embeddings()
            assert isinstance(embedding, nn.Embedding)
            embedding.weight = nn.Parameter(stored.read().float(), requires_grad=False)
            base.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            found = base.get_input_embeddings()
            assert isinstance(found, nn.Embedding)
            return found.weight.detach()

    def _tower(self, part: str) -> dict[str, Tensor]:
        """What is not trained of a tower that is built for it; {} for the heads, of which all is trained."""
        if part not in self.files:
            return {}
        if self.built[0] != part:
            model = getattr(self.config, part).model
            why = "the weights are random" if model is None else f"{model}: safetensors files do not hold all of them"
            log.info("%s.model: %s; this tower is built in memory to read its frozen weights", part, why)
            tower = build_tower(self.config, self.tokenizer, self.kernel, part)
            state = ((f"{part}.{name}", tensor) for name, tensor in tower.state_dict().items())
            self.built = part, {name: tensor for name, tensor in state if name not in self.trained}
        return self.built[1]

    def _other(self, name: str) -> ConfigError:
        return ConfigError(f"{self.checkpoint}: the frozen tensor {name} is not the one that the run was trained with")


def files_of(model: str | None) -> dict[str, Stored]:
    """The tensors of a pretrained model that is on this machine, by name; {} if it has no safetensors files here."""
    if model is None:
        return {}
    name, arguments = locate("model", model)
    if arguments:  # a GGUF file
        return {}
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        cached = (try_to_load_from_cache(name, file) for file in (INDEX, ONE))
        folder = next((Path(path).parent for path in cached if isinstance(path, str)), folder)
    try:
        return weights_in(folder)
    except ConfigError:  # a shard is not in the cache
        return {}
