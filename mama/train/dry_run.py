"""`mama train --dry-run`: settings, sizes and estimated memory of a run, without its weights, shards or a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from mama.data import augment
from mama.data.idle_settings import idle_settings
from mama.data.images import Images, is_remote
from mama.data.pairs import Pairs
from mama.data.sample_weights import usable_images
from mama.errors import ConfigError
from mama.model.mama_model import MamaModel
from mama.model.memory import states
from mama.model.tissue import kept_patches
from mama.run.run_tokenizer import make_tokenizer
from mama.settings.load import as_yaml
from mama.settings.schema import Config
from mama.train.capacity import MARGIN
from mama.train.deepspeed_config import deepspeed_settings
from mama.train.estimate import activations, parameter_count, rank_bytes, shape_of
from shards.errors import ShardError

TEXTS = 3  # shown
IMAGES = 64  # of which the share of tissue is measured


def dry_run(config: Config, ranks: int) -> Iterator[str]:
    """Yield lines about the run of `config` on `ranks` ranks. Raises `ConfigError` if it could not be started."""
    model = shape_of(config)
    batches = batch_lines(config, ranks)  # raises if the batch cannot be divided: before anything is printed
    yield from _section("Configuration", as_yaml(config).splitlines())
    if idle := idle_settings(config, fetch=False):
        yield from _section("Settings with nothing to work on", idle)
    yield from _section("Parameters", parameter_lines(model))
    yield from _section("Batches", batches)
    yield from _section("DeepSpeed", json.dumps(deepspeed_settings(config, ranks), indent=2).splitlines())
    yield from _section(f"Memory of one of {ranks} ranks, GiB", state_lines(config, model, ranks))
    yield from _section(f"Activations of {config.train.micro_batch} pairs, GiB", activation_lines(config, model, ranks))
    # Last, as it may download the tokenizer.
    yield from _section("The first texts as the language model reads them", text_lines(config))


def parameter_lines(model: nn.Module) -> Iterator[str]:
    """Yield a table of the model's parts: all parameters, and those that are trained."""
    parts = [*model.named_children(), ("all", model)]
    yield f"{'part':16} {'parameters':>15} {'trainable':>15}"
    for name, part in parts:
        yield f"{name:16} {parameter_count(part):>15,} {parameter_count(part, trainable=True):>15,}"


def batch_lines(config: Config, ranks: int) -> list[str]:
    """Return the sizes of a step and of the run, and its number of epochs if the shards are there already."""
    train = config.train
    lines = [
        f"{ranks} ranks x {train.micro_batch} pairs x {train.accumulation(ranks)} micro-batches = "
        f"{train.global_batch} pairs a step",
        f"{train.steps:,} steps x {train.global_batch} = {train.steps * train.global_batch:,} pairs",
    ]
    if config.data.require and is_remote(config.data):
        return [*lines, "pairs of an epoch: unknown (data.require needs the facts of shards that are not here)"]
    try:
        images = int(usable_images(Images(config.data, "train"), config.data).sum())
    except (ConfigError, ShardError, OSError) as error:
        return [*lines, f"pairs of an epoch: unknown ({error})"]
    return [*lines, f"{images:,} pairs in an epoch: {train.steps * train.global_batch / images:,.1f} epochs"]


def text_lines(config: Config) -> Iterator[str]:
    """Yield the texts of the run's first pairs, as the run will draw them: masked, cut and with separators."""
    if is_remote(config.data):
        yield "not shown: the shards are not here"
        return
    try:
        pairs, tokenizer = Pairs(config), make_tokenizer(config)
        texts = [pairs[number].anchor_sentences for number in range(TEXTS)]
    except (ConfigError, ShardError, OSError) as error:
        yield f"unknown ({error})"
        return
    for text in texts:
        read = tokenizer.encode(text, config.data.max_tokens)
        cut = len(tokenizer.encode(text, sys.maxsize).tokens) - len(read.tokens)
        yield f"{len(read.tokens)} tokens{f', {cut} more are cut off' if cut else ''}: {tokenizer.decode(read.tokens)}"


def state_lines(config: Config, model: nn.Module, ranks: int) -> Iterator[str]:
    """Yield a table of weights, gradients and AdamW's state under each ZeRO stage; a star marks the configured one."""
    total, trainable, train = parameter_count(model), parameter_count(model, trainable=True), config.train
    yield f"{'ZeRO':12} {'weights':>9} {'gradients':>9} {'AdamW':>9} {'together':>9} {'CPU':>9}"
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
        size = states(total, trainable, ranks, stage, train.precision, offload)
        columns = (size.weights, size.gradients, size.optimizer, size.device, size.host)
        chosen = (stage, offload) == (train.zero_stage, train.offload)
        name = f"{stage}{' offload' if offload else ''}{' *' if chosen else ''}"
        yield f"{name:12} {' '.join(f'{_gib(column):>9}' for column in columns)}"
    if train.precision == "bf16":
        yield "DeepSpeed refuses stage 0 in bf16 with gradients summed in fp32."
    yield "* as configured. Source: arXiv 1910.02054, section 3; AdamW in fp32 with its own copy of the weights."


def activation_lines(config: Config, model: MamaModel, ranks: int) -> Iterator[str]:
    """Yield a table of what a micro-batch keeps for its backward pass, with and without activation checkpointing."""
    share = 1.0
    if config.vision.tokens == "tissue":
        share, said = _tissue(config, model.vision.patch)
        yield said
    chosen = config.train.activation_checkpointing
    labels = ("kept *" if chosen is False else "kept", "checkpointed *" if chosen is True else "checkpointed")
    yield f"{'part':44} {labels[0]:>10} {labels[1]:>15}"
    for name, (kept, checkpointed) in activations(config, model, share=share).items():
        yield f"{name:44} {_gib(kept):>10} {_gib(checkpointed):>15}"
    kept, checkpointed = (rank_bytes(config, model, ranks, on, share=share)[0] for on in (False, True))
    yield f"{'together, with the states as configured':44} {_gib(kept):>10} {_gib(checkpointed):>15}"
    if chosen == "auto":
        most = round(rank_bytes(config, model, ranks, checkpointed=False)[0] / (1 - MARGIN))
        whole = ", were all images tissue" if config.vision.tokens == "tissue" else ""
        yield f"train.activation_checkpointing: auto keeps activations where a GPU has {_gib(most)} GiB free{whole}."
    yield "Per layer and token: 6 width + keys and values + inside of the MLP, and a byte per number under dropout:"
    yield "34 width in bf16 with an MLP of 4 width. Source: arXiv 2205.05198, equation 1, without attention's scores."
    yield "Checkpointed: every layer's input, and one layer at a time. A frozen MLP keeps only what goes into its GELU."
    yield "Left out: augmentation, objective, the allocator's waste."


def _tissue(config: Config, patch: int) -> tuple[float, str]:
    """The mean share of patches with tissue in augmented images, and a line about it; 1 without shards here."""
    if is_remote(config.data):
        return 1.0, "vision.tokens: the shards are not here; every patch is counted, as if all held tissue"
    try:
        pairs = Pairs(config)
        drawn = [pairs[number] for number in range(IMAGES)]
    except (ConfigError, ShardError, OSError) as error:
        return 1.0, f"vision.tokens: every patch is counted, as if all held tissue ({error})"
    images = torch.from_numpy(np.stack([pair.anchor for pair in drawn])[:, None])
    changes = torch.from_numpy(np.stack([pair.anchor_change for pair in drawn]))
    shares = kept_patches(augment.apply(images, changes), patch).double().mean(1)
    low, high = shares.quantile(torch.tensor([0.1, 0.9]).double()).tolist()
    mean, of = float(shares.mean()), f"{len(drawn)} augmented images"
    spread = f"10th to 90th percentile {low:.0%} to {high:.0%}"
    return mean, f"vision.tokens: {mean:.0%} of the patches of {of} hold tissue ({spread})"


def _section(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield ""
    yield f"== {title}"
    yield from lines


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
