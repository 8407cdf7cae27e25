"""Backbones of transformers: the shape that a configuration names, or weights, with an account of their tensors."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mama.settings.pretrained import in_one_line, locate
from mama.settings.schema import ConfigError, TextConfig, VisionConfig
from shards.errors import did_you_mean, one_line

log = logging.getLogger(__name__)

POOLED = ("bert", "vit")  # architectures that transformers builds with a pooler, which no tower uses
# A model is built before its weights are read: a file that claims more would keep the machine busy for hours.
LIMITS = {"num_hidden_layers": (0, 1000), "hidden_size": (1, 2**16), "vocab_size": (1, 2**24)}
# Masks that old GPT-2 checkpoints hold beside the weights; transformers itself passes over `attn.bias`.
BUFFERS = (".attn.masked_bias",)


def build_backbone(
    section: str, config: VisionConfig | TextConfig, known: Collection[str], attention: str, **sizes: int
) -> PreTrainedModel:
    """The model of transformers that `config` names, in fp32: pretrained, or random in the shape `config.config`.

    `known` are the architectures that `section` may have; `sizes` are settings of random ones that win over
    `config.config`. Raises `ConfigError` for another architecture, and for weights that cannot be read or do
    not fit.
    """
    if config.model is not None:
        return _load(section, config.model, config.ignore, known, attention)
    shape = _architecture(section, {**config.config, **sizes})
    _check_known(section, shape, known)
    return AutoModel.from_config(shape, attn_implementation=attention, trust_remote_code=False)


def _architecture(section: str, shape: dict[str, Any]) -> PretrainedConfig:
    if "model_type" not in shape:
        raise ConfigError(
            f"{section}.config: model_type is missing; with {section}.model=null it names the architecture"
        )
    try:
        architecture = AutoConfig.for_model(**shape)
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        raise ConfigError(f"{section}.config: {one_line(error)}") from error
    known = {*type(architecture)().to_dict(), *architecture.attribute_map}  # transformers keeps any key it is given
    for key in shape:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{section}.config: {architecture.model_type} has no setting {key}{hint}")
    return architecture


def _check_known(section: str, shape: PretrainedConfig, known: Collection[str]) -> None:
    if shape.model_type not in known:
        raise ConfigError(f"{section}: {shape.model_type} is not one of {', '.join(known)}")
    for name, (least, most) in LIMITS.items():
        value = getattr(shape, name, least)
        if not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{section}: {name} is {value!r:.40}, and no number from {least} to {most}")


def _load(section: str, model: str, ignore: list[str], known: Collection[str], attention: str) -> PreTrainedModel:
    field = f"{section}.model"
    name, arguments = locate(field, model)
    with in_one_line(f"{field}: {model}"):
        shape = AutoConfig.from_pretrained(name, trust_remote_code=False, **arguments)
    _check_known(section, shape, known)
    if shape.model_type in POOLED:
        arguments["add_pooling_layer"] = False
    with in_one_line(f"{field}: {model}"):
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
    """Log what was loaded; tensors that are missing or left over, and not ignored, are an error.

    transformers names what is left over as the file does, what is missing as the model does: the name of
    a model with a head may begin with one of `transformer.`, `bert.` and the like, which `ignore` need not repeat.
    """
    head = f"{backbone.base_model_prefix}."
    may_differ = tuple(ignore)

    def heeded(names: list[str]) -> list[str]:
        return [n for n in names if not (n.startswith(may_differ) or n.removeprefix(head).startswith(may_differ))]

    missing = sorted(info["missing_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith(BUFFERS))
    absent, left_over = heeded(missing), heeded(unexpected)
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
            f"where random values will do, put the beginning of the name into {section}.ignore"
        )
    if left_over:
        own = [name.removeprefix(head) for name in backbone.state_dict()]
        prefixes = dict.fromkeys(_foreign_prefix(name.removeprefix(head), own) for name in left_over)
        raise ConfigError(
            f"{section}.model: {model} holds {len(left_over)} tensors too many, the first is {left_over[0]}; "
            f"to do without them set {section}.ignore=[{','.join([*ignore, *prefixes])}]"
        )


def _foreign_prefix(name: str, own: list[str]) -> str:
    """The shortest beginning of `name`, up to a dot, that none of the model's own tensors has; else `name`."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if not any(tensor.startswith(prefix) for tensor in own):
            return prefix
    return name
