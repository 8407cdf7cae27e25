"""`mama train --dry-run`: what a run would be and what it would take, told without weights, shards or a GPU."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from mama.data.images import Images
from mama.data.pairs import Pairs
from mama.data.sample_weights import allowed
from mama.data.tokenizer import Tokenizer
from mama.model.attention import KERNELS
from mama.model.mama_model import MamaModel, build
from mama.model.memory import Transformer, local_head_bytes, states
from mama.model.published_shapes import SHAPES
from mama.model.towers import TEXT_MODELS
from mama.run.run_folder import make_tokenizer
from mama.settings.load import as_yaml
from mama.settings.pretrained import in_one_line, locate
from mama.settings.schema import Config, ConfigError, TextConfig
from shards.read.remote import Remote
from shards.schema import ShardError

TEXTS = 3  # that are shown
VOCABULARY = 2048  # of a tokenizer that is learned, where text.config does not say
BESIDE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # say nothing of a shape


def dry_run(config: Config, ranks: int) -> Iterator[str]:
    """Lines about the run of `config` on `ranks` ranks. Raises `ConfigError` where it could not be started."""
    model = shape_of(config)
    batches = batch_lines(config, ranks)  # what cannot be divided is told before anything is printed
    yield from _section("Configuration", as_yaml(config).splitlines())
    yield from _section("Parameters", parameter_lines(model))
    yield from _section("Batches", batches)
    from mama.train.deepspeed_engine import deepspeed_settings  # takes seconds to import, and only this needs it

    yield from _section("DeepSpeed", json.dumps(deepspeed_settings(config, ranks), indent=2).splitlines())
    yield from _section(f"Memory of one of {ranks} ranks, GiB", state_lines(config, model, ranks))
    yield from _section(f"Activations of {config.train.micro_batch} pairs, GiB", activation_lines(config, model, ranks))
    # Last, as it may wait for a hub to bring the tokenizer.
    yield from _section("The first texts as the language model reads them", text_lines(config))


def shape_of(config: Config) -> MamaModel:
    """The model on the meta device: every shape, no number."""
    config = without_weights(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        return build(config, stand_in(config.text), KERNELS["sdpa"])


def without_weights(config: Config) -> Config:
    """The same run with towers of random weights: of pretrained ones only the configuration is read."""
    vision, text = config.vision, config.text
    if vision.model is not None:
        vision = replace(vision, model=None, config=_published("vision.model", vision.model))
    if text.model is not None:
        text = replace(text, model=None, config=_published("text.model", text.model))
    return replace(config, vision=vision, text=text)


def stand_in(text: TextConfig) -> Tokenizer:
    """A tokenizer of the language model's size: one token for each row of its table, before our own two are added."""
    size = int(text.config.get("vocab_size", VOCABULARY))
    words = models.WordLevel({str(number): number for number in range(size)}, unk_token="0")
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=FastTokenizer(words)))


def parameter_lines(model: nn.Module) -> Iterator[str]:
    """A table: each part, its parameters, and how many are trained."""
    parts = [*model.named_children(), ("all", model)]
    yield f"{'part':16} {'parameters':>15} {'trainable':>15}"
    for name, part in parts:
        yield f"{name:16} {_count(part):>15,} {_count(part, trainable=True):>15,}"


def batch_lines(config: Config, ranks: int) -> list[str]:
    """How a step is put together, and how many epochs the run has where its shards are there already."""
    train = config.train
    lines = [
        f"{ranks} ranks x {train.micro_batch} pairs x {train.accumulation(ranks)} micro-batches = "
        f"{train.global_batch} pairs a step",
        f"{train.steps:,} steps x {train.global_batch} = {train.steps * train.global_batch:,} pairs",
    ]
    if config.data.require and _is_remote(config):
        return [*lines, "pairs of an epoch: unknown (data.require needs the facts of shards that are not here)"]
    try:
        images = int(allowed(Images(config.data, "train"), config.data).sum())
    except (ConfigError, ShardError, OSError) as error:
        return [*lines, f"pairs of an epoch: unknown ({error})"]
    return [*lines, f"{images:,} pairs in an epoch: {train.steps * train.global_batch / images:,.1f} epochs"]


def text_lines(config: Config) -> Iterator[str]:
    """The texts of the run's first pairs: masked, cut and with separators, as the run will draw them."""
    if _is_remote(config):
        yield "not shown: the shards are not here"
        return
    try:
        pairs, tokenizer = Pairs(config), make_tokenizer(config)
        texts = [pairs[number].anchor_text for number in range(TEXTS)]
    except (ConfigError, ShardError, OSError) as error:
        yield f"unknown ({error})"
        return
    for text in texts:
        read = tokenizer.encode(text, config.data.max_tokens)
        cut = len(tokenizer.encode(text, sys.maxsize).tokens) - len(read.tokens)
        yield f"{len(read.tokens)} tokens{f', {cut} more are cut off' if cut else ''}: {tokenizer.decode(read.tokens)}"


def state_lines(config: Config, model: nn.Module, ranks: int) -> Iterator[str]:
    """A table: weights, gradients and AdamW's state under each ZeRO stage; the configured one has a star."""
    total, trainable, train = _count(model), _count(model, trainable=True), config.train
    yield f"{'ZeRO':12} {'weights':>9} {'gradients':>9} {'AdamW':>9} {'together':>9} {'CPU':>9}"
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        of = states(total, trainable, ranks, stage, train.precision, offload)
        columns = (of.weights, of.gradients, of.optimizer, of.device, of.host)
        chosen = (stage, offload) == (train.zero_stage, train.offload)
        name = f"{stage}{' offload' if offload else ''}{' *' if chosen else ''}"
        yield f"{name:12} {' '.join(f'{_gib(size):>9}' for size in columns)}"
    if train.precision == "bf16":
        yield "DeepSpeed refuses stage 0 in bf16 with gradients summed in fp32."
    yield "* as configured. Source: arXiv 1910.02054, section 3; AdamW in fp32 with its own copy of the weights."


def activation_lines(config: Config, model: MamaModel, ranks: int) -> Iterator[str]:
    """A table: what is kept for the backward pass of a micro-batch, with and without activation checkpointing."""
    chosen = config.train.activation_checkpointing
    labels = ("kept *" if not chosen else "kept", "checkpointed *" if chosen else "checkpointed")
    yield f"{'part':44} {labels[0]:>10} {labels[1]:>15}"
    for name, (kept, checkpointed) in activations(config, model).items():
        yield f"{name:44} {_gib(kept):>10} {_gib(checkpointed):>15}"
    settings = [replace(config.train, activation_checkpointing=on) for on in (False, True)]
    kept, checkpointed = (rank_bytes(replace(config, train=train), model, ranks)[0] for train in settings)
    yield f"{'together, with the states as configured':44} {_gib(kept):>10} {_gib(checkpointed):>15}"
    yield "Per layer and token: 6 width + keys and values + inside of the MLP, and a byte per number under dropout:"
    yield "34 width in bf16 with an MLP of 4 width. Source: arXiv 2205.05198, equation 1, without attention's scores."
    yield "Checkpointed: every layer's input, and one layer at a time. A frozen MLP keeps only what goes into its GELU."
    yield "Left out: augmentation, objective, the allocator's waste."


def text_transformer(shape: Any, text: TextConfig) -> Transformer:
    """The sizes of the language model under its tuning."""
    drops = text.tune == "lora" and text.lora_dropout > 0
    return Transformer.of(shape, text.tune != "full", len(TEXT_MODELS[shape.model_type].adapted) if drops else 0)


def activations(config: Config, model: MamaModel, mask: int = 1) -> dict[str, tuple[int, int]]:
    """By part, the bytes that a micro-batch keeps for its backward pass: all, and with activation checkpointing.

    `mask` is what dropout keeps for a number, in bytes: `mama.model.memory.Transformer.layer_bytes`.
    """
    pairs, size = config.train.micro_batch, 2 if config.train.precision == "bf16" else 4
    heads, vision, text = config.heads, model.vision.backbone.config, model.text.backbone.config
    images = pairs * (2 if model.uses_partner else 1)
    texts = pairs * (2 if model.uses_partner_text and {"study", "contralateral"} & {*config.data.pairs} else 1)
    patches = math.prod(side // vision.patch_size for side in config.data.image_size)
    length, tokens = patches + model.vision.prefix, config.data.max_tokens
    towers = {
        f"image tower, {images} x {length:,} tokens": (Transformer.of(vision), images * length),
        f"text tower, at most {texts} x {tokens} tokens": (
            text_transformer(text, config.text),
            texts * tokens,
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


def rank_bytes(config: Config, model: MamaModel, ranks: int, mask: int = 1) -> tuple[int, int]:
    """Bytes of states and activations on one rank's device, and of states in CPU memory besides, as configured."""
    train = config.train
    of = states(_count(model), _count(model, trainable=True), ranks, train.zero_stage, train.precision, train.offload)
    kept = sum(both[train.activation_checkpointing] for both in activations(config, model, mask).values())
    return of.device + kept, of.host


def _is_remote(config: Config) -> bool:
    return any(Remote.at(folder, config.data.cache_folder) for folder in config.data.shards)


def _published(field: str, name: str) -> dict[str, Any]:
    """The configuration of a pretrained model, as the `config` of a tower with random weights."""
    if name in SHAPES:  # no network is asked for what is known
        return SHAPES[name]
    folder, arguments = locate(field, name)
    try:
        with in_one_line(f"{field}: the configuration of {name}"):
            shape = AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
    except ConfigError as error:
        section = field.partition(".")[0]
        raise ConfigError(f"{error}; name a local folder, or `model_type` and sizes in {section}.config") from error
    known = {*type(shape)().to_dict(), *shape.attribute_map}
    return {key: value for key, value in shape.to_dict().items() if key in known and key not in BESIDE}


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield ""
    yield f"== {title}"
    yield from lines


def _count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
