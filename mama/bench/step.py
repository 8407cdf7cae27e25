"""`mama bench step`: training steps on synthetic pairs through the real engine, on the device that is there."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mama.data import augment
from mama.data.batches import Batch, Texts
from mama.data.tokenizer import Tokenizer
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.flops import pair_flops, peak_flops
from mama.model.mama_model import MamaModel, build
from mama.objective.losses import objective
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, ConfigError, DataConfig, HeadsConfig, TextConfig, TrainConfig, VisionConfig
from mama.train.dry_run import rank_bytes, shape_of, stand_in, without_weights

TOKENS_OF_A_SENTENCE = 14  # of a structured report


Step = Callable[[Batch], Tensor]  # one update by a batch; returns its loss


@dataclass(frozen=True)
class Measured:
    """One rank's steps of one micro-batch each."""

    pairs: int
    seconds: float  # median of the steps
    memory_gb: float  # GiB at most: on CUDA what tensors took, on the CPU the whole process
    flops: float  # operations of a pair
    peak: float | None  # operations per second of the device at most, where they are known
    estimate_gb: float | None = None  # what `mama train --dry-run` says of it

    @property
    def rate(self) -> float:
        return self.pairs / self.seconds

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak that the model's own operations take (Chowdhery et al. 2022, appendix B)."""
        return self.rate * self.flops / self.peak if self.peak else None


def published() -> Config:
    """The paper's towers at 518 pixels, with random weights: ViT-B/14 with registers, a GPT-2 of BioMedLM's 2.7 B."""
    return without_weights(Config(name="published"))


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


def bench_step(config: Config | None, rounds: int, plain: bool = False) -> Iterator[str]:
    """Measure `rounds` steps behind one to warm up, without activation checkpointing and with it; lines in Markdown.

    Without `config`, the published shapes on CUDA and tiny ones on the CPU. On CUDA `train.attention=auto` is each
    kernel in turn, the first also at the largest micro-batch that fits. `plain` adds the two steps of
    `mama.bench.plain_step`. Every row has a process of its own, so that none sees the memory of another.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            f"RANK: {os.environ['RANK']}, but `mama bench step` starts its own processes; call it without a launcher"
        )
    cuda = torch.cuda.is_available()
    config = without_weights(config or (published() if cuda else tiny()))
    train, tokens = config.train, config.data.max_tokens
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    size = " x ".join(map(str, config.data.image_size))
    how = f"random weights, {train.precision}, ZeRO stage {train.zero_stage}, 1 rank"
    yield f"{config.name}: {how}, images of {size}, texts of {tokens} tokens, {where}"
    if plain:
        yield (
            "plain: the step in transformers, peft and PyTorch alone, without ZeRO; published: that with the habits of "
            "the published code that `mama/bench/plain_step.py` lists"
        )
    yield ""
    yield (
        "| step | attention | activation checkpointing | micro-batch | pairs/s | text tokens/s | peak memory, GiB "
        "| estimated, GiB | MFU in bf16 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for number, setting in enumerate(_each_kernel(train, cuda)):
        function = measure_to_the_largest if cuda and not number else measure
        yield from _both(function, f"mama | {setting.attention}", replace(config, train=setting), rounds)
    if plain:
        yield from _both(measure_plain, "plain | sdpa", config, rounds)
        yield from _both(measure_published, "published | sdpa, text eager", config, rounds)


def _each_kernel(train: TrainConfig, cuda: bool) -> list[TrainConfig]:
    """The one configured; where `auto` would take xformers, xformers and then PyTorch's."""
    if train.attention != "auto":
        return [train]
    both = [replace(train, attention="xformers"), replace(train, attention="sdpa")]
    xformers = cuda and run_on_ranks(_chosen, Config()) == attention.KERNELS["xformers"]
    return both if xformers else both[1:]


def _chosen(config: Config) -> str:
    """In a process of its own: to try xformers takes memory of the GPU."""
    return attention.choose("auto", torch.device("cuda"))


def _both(function: Callable[[Config], list[Measured]], step: str, config: Config, rounds: int) -> Iterator[str]:
    """Rows without activation checkpointing and with it; `step` fills the first two columns."""
    pairs, tokens = config.train.micro_batch, config.data.max_tokens
    for checkpointing in (False, True):
        train = replace(
            config.train, activation_checkpointing=checkpointing, global_batch=pairs, ranks=1, steps=rounds + 1
        )
        label = f"| {step} | {'on' if checkpointing else 'off'}"
        measured = run_on_ranks(function, replace(config, train=train))
        if pairs not in [m.pairs for m in measured]:
            yield f"{label} | {pairs} | does not fit | | | | |"
        for one in measured:
            yield f"{label} {_row(one, tokens)}"


def measure(config: Config) -> list[Measured]:
    """On one rank: `train.steps` steps, the first unmeasured; nothing where the GPU's memory does not suffice."""
    return _measured(config, framework_step, lambda found, room: [config.train.micro_batch])


def measure_to_the_largest(config: Config) -> list[Measured]:
    """The same, and the largest micro-batch that fits, to a sixteenth."""
    wanted = config.train.micro_batch
    found = _measured(config, framework_step, lambda found, room: growing(wanted, found, room))
    return [one for one in found if one.pairs == wanted or one is found[-1]]


def measure_plain(config: Config, as_published: bool = False) -> list[Measured]:
    """As `measure`, of the step without this framework."""
    from mama.bench.plain_step import plain_step

    start = partial(plain_step, as_published=as_published)
    found = _measured(config, start, lambda found, room: [config.train.micro_batch])
    return [replace(one, estimate_gb=None) for one in found]  # the estimate is of ours


def measure_published(config: Config) -> list[Measured]:
    """As `measure_plain`, with the habits of the published code."""
    return measure_plain(config, as_published=True)


def growing(wanted: int, found: list[Measured], room_gb: float) -> Iterator[int]:
    """Half of `wanted`, `wanted`, then seven eighths of the way to what `room_gb` holds by the last two.

    In steps of a sixteenth and 1 at least. `found` is what has been measured so far. It ends where a micro-batch
    does not fit, with the caller. Few are tried: a large one takes seconds.
    """
    yield from sorted({max(1, wanted // 2), wanted, max(2, wanted)})
    while True:
        before, last = found[-2:]
        growth = (last.memory_gb - before.memory_gb) / (last.pairs - before.pairs)
        left = (room_gb - last.memory_gb) / growth if growth > 0 else 0
        yield last.pairs + max(1, last.pairs // 16, int(7 * left / 8))


def _measured(
    config: Config,
    start: Callable[[Config, Tokenizer, torch.device], Step],
    sizes: Callable[[list[Measured], float], Iterable[int]],
) -> list[Measured]:
    """One started model at micro-batches of `sizes(found, room in GiB)`, up to the first that does not fit."""
    from mama.train.deepspeed_engine import join_ranks

    device = join_ranks()
    found: list[Measured] = []
    try:
        tokenizer = stand_in(config.text)
        step, shape = start(config, tokenizer, device), shape_of(config)
        for pairs in sizes(found, _memory_of(device)):
            train = replace(config.train, global_batch=pairs, micro_batch=pairs)
            found.append(_timed(step, shape, replace(config, train=train), tokenizer, device))
    except torch.OutOfMemoryError:
        pass
    finally:
        dist.destroy_process_group()
    return found


def framework_step(config: Config, tokenizer: Tokenizer, device: torch.device) -> Step:
    """The model under its engine, and one update as `mama train` makes it, without what it logs."""
    from mama.train.deepspeed_engine import start_engine

    with device:  # random numbers for billions of parameters take minutes on a CPU
        model = build(config, tokenizer, attention.choose(config.train.attention, device))
    prepare_blocks(model, config.train, device)
    engine = start_engine(model, config)
    engine.train()

    def step(batch: Batch) -> Tensor:
        total, _terms = objective(engine(batch), config.loss, step=config.loss.local_start)
        engine.backward(total)
        engine.step()
        return total.detach()

    return step


def _timed(step: Step, shape: MamaModel, config: Config, tokenizer: Tokenizer, device: torch.device) -> Measured:
    batch = synthetic(config, tokenizer).to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(config.train.steps):
        started = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    sentences = batch.texts.separators.shape[1]
    flops = pair_flops(shape, config.data.image_size, config.data.max_tokens, sentences=sentences)
    data = replace(config.data, pairs=["augment"], pair_weights=[])  # one text serves both views of a synthetic pair
    return Measured(
        config.train.micro_batch,
        statistics.median(seconds[1:]),
        _peak_memory_gb(device),
        flops,
        peak_flops(device),
        rank_bytes(replace(config, data=data), shape, 1)[0] / 2**30,
    )


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


def _row(one: Measured, tokens: int) -> str:
    mfu = "unknown" if one.mfu is None else f"{one.mfu:.1%}"
    estimate = "" if one.estimate_gb is None else f"{one.estimate_gb:.2f}"
    return f"| {one.pairs} | {one.rate:.3g} | {one.rate * tokens:,.0f} | {one.memory_gb:.2f} | {estimate} | {mfu} |"


def _memory_of(device: torch.device) -> float:
    """GiB that a micro-batch may grow into; none on the CPU, where nothing is searched."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
