"""The model of a run without weights, and the memory that one rank needs for it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model.attention import KERNELS
from mama.model.classifier import Classifier
from mama.model.mama_model import MamaModel, build
from mama.model.memory import States, Transformer, local_head_bytes, states
from mama.model.text_tower import TEXT_MODELS
from mama.run.run_tokenizer import VOCABULARY
from mama.settings.pretrained import loading_errors, locate
from mama.settings.schema import Config, TextConfig

# Hub name -> the sizes in its config.json (huggingface.co, read in November 2026), without the tokens that begin and
# end a text, which only the tokenizer uses.
SHAPES: dict[str, dict[str, Any]] = {
    "facebook/dinov2-with-registers-base": {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 14, "image_size": 518, "num_register_tokens": 4,
    },
    "stanford-crfm/BioMedLM": {
        "model_type": "gpt2", "vocab_size": 28896, "n_positions": 1024, "n_embd": 2560, "n_layer": 32, "n_head": 20,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
NOT_OF_SHAPE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def shape_of(config: Config) -> MamaModel:
    """Build the model on the meta device, which holds shapes and no numbers."""
    config = without_weights(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        return build(config, stand_in(config.text), KERNELS["sdpa"])


def without_weights(config: Config) -> Config:
    """Replace pretrained towers by random weights of the same shape; only their configuration is read.

    Raises `ConfigError` if that is neither known, nor here, nor on a hub.
    """
    vision, text = config.vision, config.text
    if vision.model is not None:
        vision = replace(vision, model=None, config=_published("vision.model", vision.model))
    if text.model is not None:
        text = replace(text, model=None, config=_published("text.model", text.model))
    return replace(config, vision=vision, text=text)


def stand_in(text: TextConfig) -> Tokenizer:
    """Return a tokenizer with as many tokens as the language model's embedding has rows, and our own two."""
    size = int(text.config.get("vocab_size", VOCABULARY))
    words = models.WordLevel({str(number): number for number in range(size)}, unk_token="0")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(words)))


def text_transformer(shape: Any, text: TextConfig) -> Transformer:
    """Return the sizes of the language model of configuration `shape`, tuned according to `text`."""
    drops = text.tune == "lora" and text.lora_dropout > 0
    return Transformer.of(shape, text.tune != "full", len(TEXT_MODELS[shape.model_type].adapted) if drops else 0)


def activations(config: Config, model: MamaModel, mask: int = 1, share: float = 1.0) -> dict[str, tuple[int, int]]:
    """Return bytes that a micro-batch keeps for its backward pass, by part: (without, with) activation checkpointing.

    `mask`: bytes that dropout keeps for each number, see `mama.model.memory.Transformer.layer_bytes`. `share` of the
    patches that are encoded; the patch head counts as many, also where `loss.local_patches` gives it fewer.
    """
    pairs, size = config.train.micro_batch, 2 if config.train.precision == "bf16" else 4
    heads, vision, text = config.heads, model.vision.backbone.config, model.text.backbone.config
    images = pairs * (2 if model.uses_partner else 1)
    texts = pairs * (2 if model.uses_partner_text and {"study", "contralateral"} & {*config.data.pairs} else 1)
    patches = round(share * model.vision.patches_of(config.data.image_size))
    length, tokens = patches + model.vision.prefix, config.data.max_tokens
    reads = 2 if model.reads_alone else 1  # a text as a whole, and sentence by sentence
    times = " twice" if reads == 2 else ""
    towers = {
        f"image tower, {images} x {length:,} tokens": (Transformer.of(vision), images * length),
        f"text tower, at most {texts} x {tokens} tokens{times}": (
            text_transformer(text, config.text),
            reads * texts * tokens,
        ),
    }
    found = {
        name: (tower.activations(count, size, mask), tower.inputs(count, size))
        for name, (tower, count) in towers.items()
    }
    largest = max(tower.layer_bytes(count, size, mask) for tower, count in towers.values())
    found["the largest layer, computed again"] = 0, largest
    if model.patch_head is not None:
        local = local_head_bytes(pairs * patches, model.vision.width, heads.hidden_dim, heads.embed_dim, size)
        found[f"patch head, {pairs} x {patches:,} patches"] = local, local
    return found


def rank_bytes(
    config: Config, model: MamaModel, ranks: int, checkpointed: bool, mask: int = 1, share: float = 1.0
) -> tuple[int, int]:
    """Return the bytes of one rank: states and activations on its device, and offloaded states in CPU memory.

    `checkpointed`: with activation checkpointing. Other arguments as for `activations`.
    """
    of = states_of(config, model, ranks)
    kept = sum(both[checkpointed] for both in activations(config, model, mask, share).values())
    return of.device + kept, of.host


def classifier_bytes(config: Config, model: Classifier, ranks: int) -> int:
    """Return the bytes of one rank that fine-tunes `model` and keeps all activations; its images may be all tissue."""
    size = 2 if config.train.precision == "bf16" else 4
    tokens = model.vision.prefix + model.vision.patches_of(config.data.image_size)
    tower = Transformer.of(model.vision.backbone.config)
    of = states_of(config, model, ranks)
    return of.device + of.host + tower.activations(config.train.micro_batch * tokens, size, size)


def states_of(config: Config, model: nn.Module, ranks: int) -> States:
    """Return the bytes of weights, gradients and AdamW's state of `model` on one rank."""
    total, trainable, train = parameter_count(model), parameter_count(model, trainable=True), config.train
    return states(total, trainable, ranks, train.zero_stage, train.precision, train.offload)


def _published(field: str, name: str) -> dict[str, Any]:
    """The configuration of a pretrained model, for the `config` of a tower with random weights."""
    if name in SHAPES:  # without a request to a hub
        return SHAPES[name]
    folder, arguments = locate(field, name)
    try:
        with loading_errors(f"{field}: the configuration of {name}"):
            shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
    except ConfigError as error:
        section = field.partition(".")[0]
        raise ConfigError(f"{error}; name a local folder, or `model_type` and sizes in {section}.config") from error
    known = {*type(shape)().to_dict(), *shape.attribute_map}
    return {key: value for key, value in shape.to_dict().items() if key in known and key not in NOT_OF_SHAPE}


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Return the number of parameters, or of trainable parameters only."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)
