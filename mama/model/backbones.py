"""Backbones from transformers: pretrained weights, every tensor accounted for, or random ones in a configured shape."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from mama.errors import ConfigError
from mama.settings.pretrained import loading_errors, locate
from mama.settings.schema import TextConfig, VisionConfig
from shards.errors import did_you_mean, one_line

log = logging.getLogger(__name__)

POOLED = ("bert", "vit")  # architectures that transformers builds with a pooler, which no tower uses
# A model is built before its weights are read: a config with larger numbers would keep the machine busy for hours.
LIMITS = {"num_hidden_layers": (0, 1000), "hidden_size": (1, 2**16), "vocab_size": (1, 2**24)}
# Masks that old GPT-2 checkpoints store beside the weights; transformers itself ignores `attn.bias`.
BUFFERS = (".attn.masked_bias",)


def build_backbone(
    section: str,
    config: VisionConfig | TextConfig,
    known: Collection[str],
    attention: str,
    empty: bool = False,
    **sizes: int,
) -> PreTrainedModel:
    """The transformers model of a config section, in fp32: pretrained, or random in the shape `config.config`.

    `known` are the architectures allowed in `section`; `sizes` override `config.config` of random models. With `empty`
    no weights are read: for the meta device, where a model has names and shapes alone. Raises
    `ConfigError` for another architecture, and for weights that cannot be read or do not match.
    """
    if config.model is not None:
        return _load(section, config.model, config.ignore, known, attention, empty)
    shape = _architecture(section, {**config.config, **sizes})
    _check_known(section, shape, known)
    return AutoModel.from_config(shape, attn_implementation=attention, trust_remote_code=False)


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a tower, in order: those that transformers itself would checkpoint."""
    blocks: list[nn.Module] = [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            f"{type(tower).__name__}: this version of transformers marks no blocks in it; install another"
        )
    return blocks


def drop_pooler(backbone: PreTrainedModel) -> None:
    """Remove the pooler of BERT and ViT: no tower uses it, so its parameters would never get a gradient."""
    if hasattr(backbone, "pooler"):
        cast(Any, backbone).pooler = None


def fuse_gelu(backbone: PreTrainedModel) -> None:
    """Replace GPT-2's GELU, written out in Python, by the kernel, which saves memory (docs/benchmarks.md)."""
    for module in backbone.modules():
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _architecture(section: str, shape: dict[str, Any]) -> PretrainedConfig:
    """The transformers config of `shape`; raises `ConfigError` for a missing or unknown setting."""
    if "model_type" not in shape:
        raise ConfigError(
            f"{section}.config: model_type is missing; with {section}.model=null it must name the architecture"
        )
    try:
        architecture = AutoConfig.for_model(**shape)
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        raise ConfigError(f"{section}.config: {one_line(error)}") from error
    known = {*type(architecture)().to_dict(), *architecture.attribute_map}  # transformers accepts any key
    for key in shape:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{section}.config: {architecture.model_type} has no setting {key}{hint}")
    return architecture


def _check_known(section: str, shape: PretrainedConfig, known: Collection[str]) -> None:
    """Raise `ConfigError` for an architecture that is not `known`, or a size outside `LIMITS`."""
    if shape.model_type not in known:
        raise ConfigError(f"{section}: {shape.model_type} is not one of {', '.join(known)}")
    for name, (least, most) in LIMITS.items():
        value = getattr(shape, name, least)
        if not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{section}: {name} is {value!r:.40}, not an integer from {least} to {most}")


def _load(
    section: str, model: str, ignore: list[str], known: Collection[str], attention: str, empty: bool
) -> PreTrainedModel:
    """Read the pretrained `model`, a folder, file or hub name. Raises `ConfigError` as `build_backbone` does."""
    field = f"{section}.model"
    name, arguments = locate(field, model)
    with loading_errors(f"{field}: {model}"):
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    _check_known(section, shape, known)
    if empty:
        return AutoModel.from_config(shape, attn_implementation=attention, trust_remote_code=False, dtype=torch.float32)
    if shape.model_type in POOLED:
        arguments["add_pooling_layer"] = False
    with loading_errors(f"{field}: {model}"):
        backbone, info = AutoModel.from_pretrained(
            name,
            config=shape,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=torch.float32,
            output_loading_info=True,
            **arguments,
        )
    _account(section, model, ignore, backbone, info)
    return backbone


def _account(section: str, model: str, ignore: list[str], backbone: PreTrainedModel, info: dict[str, Any]) -> None:
    """Log how many tensors were loaded; raise `ConfigError` for missing or unexpected ones that `ignore` does not name.

    `ignore` holds prefixes of names, with or without the prefix that the file of a model with a head may have
    (`transformer.`, `bert.` and the like): transformers names unexpected tensors as the file does, missing ones as
    the model does.
    """
    head = f"{backbone.base_model_prefix}."
    may_differ = tuple(ignore)

    def not_ignored(names: list[str]) -> list[str]:
        return [n for n in names if not (n.startswith(may_differ) or n.removeprefix(head).startswith(may_differ))]

    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith(BUFFERS))
    absent, left_over = not_ignored(missing), not_ignored(unexpected)
    log.info(
        "%s.model: %s: %d tensors loaded, %d missing, %d unexpected, %d of these ignored",
        section,
        model,
        len(backbone.state_dict()) - len(missing),
        len(missing),
        len(unexpected),
        len(missing) + len(unexpected) - len(absent) - len(left_over),
    )
    if absent:
        raise ConfigError(
            f"{section}.model: {model} lacks {len(absent)} tensors, the first is {absent[0]}; "
            f"to start them at random, add the beginning of the name to {section}.ignore"
        )
    if left_over:
        own = [name.removeprefix(head) for name in backbone.state_dict()]
        prefixes = dict.fromkeys(_foreign_prefix(name.removeprefix(head), own) for name in left_over)
        raise ConfigError(
            f"{section}.model: {model} has {len(left_over)} unexpected tensors, the first is {left_over[0]}; "
            f"to drop them set {section}.ignore=[{','.join([*ignore, *prefixes])}]"
        )


def _foreign_prefix(name: str, own: list[str]) -> str:
    """The shortest prefix of `name`, up to a dot, that no tensor of the model has; else `name`."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if not any(tensor.startswith(prefix) for tensor in own):
            return prefix
    return name
