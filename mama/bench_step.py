"""`mama bench step`: training steps on synthetic pairs through the real engine, on the device that is there."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from mama import attention, augment
from mama.config import Config, ConfigError, DataConfig, HeadsConfig, TextConfig, TrainConfig, VisionConfig
from mama.data import Batch, Texts
from mama.dryrun import stand_in, without_weights
from mama.flops import pair_flops, peak_flops
from mama.launch import run_on_ranks
from mama.losses import objective
from mama.model import build
from mama.tokens import Tokenizer

TOKENS_OF_A_SENTENCE = 14  # of a structured report


@dataclass(frozen=True)
class Measured:
    """One rank's steps of one micro-batch each."""

    pairs: int
    seconds: float  # median of the steps
    memory_gb: float  # GiB at most: on CUDA what tensors took, on the CPU the whole process
    flops: float  # operations of a pair
    peak: float | None  # operations per second of the device at most, where they are known

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the model's own operations take (Chowdhery et al. 2022, appendix B)."""
        return self.rate * self.flops / self.peak if self.peak else None


def published() -> Config:
    """The shapes of the paper, random weights: ViT-B/14 with registers at 518 pixels, a GPT-2 of BioMedLM's 2.7 B."""
    vision = {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 14, "image_size": 518, "num_register_tokens": 4,
    }  # fmt: skip
    text = {
        "model_type": "gpt2", "vocab_size": 28896, "n_positions": 1024, "n_embd": 2560, "n_layer": 32, "n_head": 20,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Config(
        name="published", vision=VisionConfig(model=None, config=vision), text=TextConfig(model=None, config=text)
    )


def tiny() -> Config:
    """Small enough for a moment of one core."""
    vision = {
        "model_type": "dinov2_with_registers", "num_channels": 1, "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 16, "image_size": 64,
    }  # fmt: skip
    text = {
        "model_type": "gpt2", "vocab_size": 512, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 2,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Config(
        name="tiny",
        data=DataConfig(image_size=(64, 64), max_tokens=56),
        vision=VisionConfig(model=None, config=vision),
        text=TextConfig(model=None, config=text),
        heads=HeadsConfig(embed_dim=32, hidden_dim=64, view_hidden_dim=48),
        train=TrainConfig(global_batch=8, micro_batch=8, precision="fp32"),
    )


def bench_step(config: Config | None, rounds: int) -> Iterator[str]:
    """Measure `rounds` steps behind one to warm up, with activation checkpointing and without; lines in Markdown.

    Without `config`, the published shapes on CUDA and tiny ones on the CPU. On CUDA also at the largest micro-batch
    that fits. Every figure has a process of its own, so that none sees the memory of another.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            f"RANK: {os.environ['RANK']}, but `mama bench step` starts its own processes; call it without a launcher"
        )
    cuda = torch.cuda.is_available()
    config = without_weights(config or (published() if cuda else tiny()))
    train = config.train
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    size = " x ".join(map(str, config.data.image_size))
    how = f"random weights, {train.precision}, ZeRO stage {train.zero_stage}, 1 rank"
    yield f"{config.name}: {how}, images of {size}, texts of {config.data.max_tokens} tokens, {where}"
    yield ""
    yield "| activation checkpointing | micro-batch | pairs/s | peak memory, GiB | MFU in bf16 |"
    yield "|---|---|---|---|---|"
    for checkpointing in (True, False):
        yield from _rows(replace(config, train=replace(train, activation_checkpointing=checkpointing)), rounds, cuda)


def _rows(config: Config, rounds: int, search: bool) -> Iterator[str]:
    """The configured micro-batch; with `search`, or where that does not fit, the largest that does."""
    name, wanted = "on" if config.train.activation_checkpointing else "off", config.train.micro_batch
    found: dict[int, Measured] = {}

    def fits(pairs: int) -> bool:
        train = replace(config.train, global_batch=pairs, micro_batch=pairs, ranks=1, steps=rounds + 1)
        measured = run_on_ranks(measure, replace(config, train=train))
        if measured is not None:
            found[pairs] = measured
        return measured is not None

    if fits(wanted):
        yield _row(name, found[wanted])
        most = largest(fits, wanted) if search else wanted
    else:
        yield f"| {name} | {wanted} | does not fit | | |"
        most = largest(fits, 0, wanted)
    if most in found and most != wanted:
        yield _row(f"{name}, the largest that fits", found[most])


def largest(fits: Callable[[int], bool], fitting: int, too_many: int | None = None) -> int:
    """The largest number that fits, when `fitting` does and `too_many` does not: by doubling, then bisecting."""
    while too_many is None:
        if fits(2 * fitting):
            fitting *= 2
        else:
            too_many = 2 * fitting
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def measure(config: Config) -> Measured | None:
    """On one rank: `train.steps` steps, the first unmeasured; None where the GPU's memory does not suffice."""
    from mama.engine import join_ranks, start_engine

    device = join_ranks()
    try:
        tokenizer = stand_in(config.text)
        with device:  # random numbers for billions of parameters take minutes on a CPU
            model = build(config, tokenizer, attention.choose(config.train.attention, device))
        batch = synthetic(config, tokenizer).to(device)
        sentences = batch.texts.separators.shape[1]
        flops = pair_flops(model, config.data.image_size, config.data.max_tokens, sentences=sentences)
        engine = start_engine(model, config)
        engine.train()
        seconds = []
        for _ in range(config.train.steps):
            started = time.perf_counter()
            total, _terms = objective(engine(batch), config.loss, step=config.loss.local_start)
            engine.backward(total)
            engine.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        median, memory = statistics.median(seconds[1:]), _peak_memory_gb(device)
        return Measured(config.train.micro_batch, median, memory, flops, peak_flops(device))
    except torch.OutOfMemoryError:
        return None
    finally:
        dist.destroy_process_group()


def synthetic(config: Config, tokenizer: Tokenizer) -> Batch:
    """One micro-batch of noise with texts of full length, the same for both views of a pair, on the CPU."""
    pairs, size, length = config.train.micro_batch, config.data.image_size, config.data.max_tokens
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    tokens = torch.randint(len(tokenizer) - 2, (pairs, length), generator=generator)
    ends = torch.arange(min(length, TOKENS_OF_A_SENTENCE) - 1, length, TOKENS_OF_A_SENTENCE).expand(pairs, -1)
    tokens.scatter_(1, ends, tokenizer.separator_id)
    whole = torch.ones_like(tokens, dtype=torch.bool)
    images = torch.randint(256, (2, pairs, 1, *size), generator=generator, dtype=torch.uint8)
    drawn = [augment.draw(config.data.augment, image.numpy(), rng) for image in images.flatten(0, 2)]
    changes = torch.from_numpy(np.stack(drawn))
    numbers = torch.arange(pairs)
    return Batch(
        keys=[str(number) for number in range(pairs)],
        anchors=images[0],
        partners=images[1],
        anchor_changes=changes[:pairs],
        partner_changes=changes[pairs:],
        texts=Texts(tokens, whole, ends.contiguous(), torch.ones_like(ends, dtype=torch.bool)),
        anchor_text=numbers,
        partner_text=numbers,
        text_ids=numbers,
        partner_text_ids=numbers,
    )


def _row(name: str, measured: Measured) -> str:
    mfu = "unknown" if measured.mfu is None else f"{measured.mfu:.1%}"
    return f"| {name} | {measured.pairs} | {measured.rate:.3g} | {measured.memory_gb:.2f} | {mfu} |"


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
