"""Adapters of the language model: merged into a tensor of its base, or a folder that peft reads beside the base's name.

All of it is computed in fp32, with the operations of peft: the results are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.export.parts import PEFT
from mama.export.weight_files import fill
from mama.model.mama_model import quiet
from mama.model.text_tower import OwnTokens, TextTower, build_text
from mama.run.files import read_object, write_json
from mama.run.model_state import digest_of
from mama.run.portable import portable, rewrite_without_paths
from mama.run.tensor_file import Shape, stored_tensors, write_tensors
from mama.settings.schema import Config

ADAPTER, BASE = "adapter_model.safetensors", "base.json"
NAME = "default"  # of the adapter, to peft

Read = Callable[[str], Tensor]


def require_adapter(config: Config) -> None:
    """Raise `ConfigError` if the language model of a run cannot be an adapter beside the name of its base."""
    if config.text.tune == "full":
        raise ConfigError(
            "--lora adapter: text.tune is full: every weight is trained, so there is no base; leave it out"
        )
    if config.text.model is None:
        raise ConfigError(
            "--lora adapter: text.model is null: the base is random weights, which nobody else has; leave it out"
        )


def merges(tower: TextTower) -> dict[str, Callable[[Tensor, Read], Tensor]]:
    """By the name of a base tensor in the model: what makes of it the tensor with what was trained beside it."""
    found: dict[str, Callable[[Tensor, Read], Tensor]] = {}
    for name, module in tower.backbone.named_modules():
        place = f"text.backbone.{name}"
        if isinstance(module, LoraLayer):
            found[f"{place}.base_layer.weight"] = _lora(module, place)
        elif isinstance(module, OwnTokens):
            found[f"{place}.base_layer.weight"] = _tokens(module, place)
    return found


def _lora(module: LoraLayer, place: str) -> Callable[[Tensor, Read], Tensor]:
    scaling, transposed = module.scaling[NAME], bool(getattr(module, "fan_in_fan_out", False))

    def merge(base: Tensor, read: Read) -> Tensor:
        delta = (read(f"{place}.lora_B.{NAME}.weight") @ read(f"{place}.lora_A.{NAME}.weight")).mul_(scaling)
        return (delta.T if transposed else delta).add_(base)

    return merge


def _tokens(module: OwnTokens, place: str) -> Callable[[Tensor, Read], Tensor]:
    rows = torch.tensor(module.token_indices[NAME])

    def merge(base: Tensor, read: Read) -> Tensor:
        return base.index_copy(0, rows, read(f"{place}.trainable_tokens_delta.{NAME}"))

    return merge


def adapter_names(tower: TextTower) -> dict[str, str]:
    """{name in peft's file: name in the model} of the trained tensors."""
    trained = [name for name, parameter in tower.backbone.named_parameters() if parameter.requires_grad]
    return {name.replace(f".{NAME}", ""): f"text.backbone.{name}" for name in trained}


def write_adapter(
    config: Config, tower: TextTower, own: Mapping[str, Tensor], digest: str, vocabulary: int, folder: Path
) -> None:
    """Write the tensors of `adapter_names`, in fp32, in which they are merged, and which base has the `digest`."""
    write_tensors(folder / ADAPTER, {n: Shape.of(t) for n, t in own.items()}, own.__getitem__, {"format": "pt"})
    assert isinstance(tower.backbone, PeftModel)
    tower.backbone.peft_config[NAME].base_model_name_or_path = portable(config).text.model
    tower.backbone.peft_config[NAME].inference_mode = True
    tower.backbone.peft_config[NAME].save_pretrained(str(folder))
    rewrite_without_paths(folder / "adapter_config.json")
    name, layers = portable(config).text.model, config.text.layers
    write_json(folder / BASE, {"name": name, "sha256": digest, "vocabulary": vocabulary, "layers": layers})


def base_digest(tower: TextTower, digests: Mapping[str, str], read: Read) -> str:
    """SHA-256 over the digests of all frozen tensors of a base, by name.

    Of the token embedding the rows that the adapter replaces count as zeros: in the base they are random.
    """
    own = {f"text.backbone.{name}": module for name, module in tower.backbone.named_modules()}
    ((place, tokens),) = ((name, module) for name, module in own.items() if isinstance(module, OwnTokens))
    embedding = f"{place}.base_layer.weight"
    rest = read(embedding).index_fill(0, torch.tensor(tokens.token_indices[NAME]), 0)
    found = {PEFT.sub("", name.removeprefix("text.backbone.")): digest for name, digest in digests.items()}
    found[PEFT.sub("", embedding.removeprefix("text.backbone."))] = digest_of(rest)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def load_adapted(folder: Path, config: Config, tokenizer: Tokenizer, kernel: str, base: str | None) -> TextTower:
    """The base of the adapter in `folder`, at `base` or by its recorded name, with the adapter merged into it, in fp32.

    Raises `ConfigError` if the base cannot be loaded, or is not the one that the adapter was trained on.
    """
    recorded = read_object(folder / BASE)
    name = base or str(recorded.get("name"))
    fix = "name the place of the right one: base=... of load_model, --base of `mama predict`, text.model of `mama eval`"
    try:
        with torch.random.fork_rng([]), quiet():
            torch.manual_seed(config.seed)  # of the rows of the embedding that the base does not have
            tower = build_text(replace(config.text, model=name), tokenizer, kernel)
    except ConfigError as error:
        raise ConfigError(f"{folder}: needs its base {name}, but {error}; {fix}") from None
    own = {f"text.{n}": parameter for n, parameter in tower.named_parameters()}
    digests = {n: digest_of(parameter) for n, parameter in own.items() if not parameter.requires_grad}
    if base_digest(tower, digests, lambda n: own[n].detach()) != recorded.get("sha256"):
        raise ConfigError(f"{folder}: {name} has other weights than the base that it was trained on; {fix}")
    names = {stored: origin.removeprefix("text.") for stored, origin in adapter_names(tower).items()}
    fill(tower, names, stored_tensors(folder / ADAPTER), folder / ADAPTER)
    tower.merge_adapters()
    return tower
