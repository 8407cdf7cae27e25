"""`mama bench step`: the training step on synthetic pairs, on this machine's GPU or CPU."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mama.bench.plain_step import plain_step
from mama.bench.synthetic import published, synthetic, tiny
from mama.data import augment
from mama.data.batches import Batch
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.flops import pair_flops, peak_flops
from mama.model.mama_model import MamaModel, build
from mama.model.tissue import kept_patches
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, TrainConfig
from mama.train.deepspeed_engine import join_ranks, start_engine
from mama.train.estimate import rank_bytes, shape_of, stand_in, without_weights
from mama.train.throughput import peak_memory_gb
from mama.train.training_step import training_step

Step = Callable[[Batch], Tensor]  # one update by a batch; returns its loss


@dataclass(frozen=True)
class Measured:
    """The steps of one rank, by one micro-batch each."""

    pairs: int
    seconds: float  # median of the steps
    memory_gb: float  # peak in GiB: of tensors on CUDA, of the whole process on the CPU
    image_tokens: float  # that the image tower encodes of an image, on average
    flops: float  # operations for a pair
    peak: float | None  # operations per second of the device, if known
    estimate_gb: float | None = None  # by `mama train --dry-run`

    @property
    def rate(self) -> float:
        """Pairs per second."""
        return self.pairs / self.seconds

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak taken by the model's own operations (Chowdhery et al. 2022, appendix B)."""
        return self.rate * self.flops / self.peak if self.peak else None


def bench_step(config: Config | None, rounds: int, plain: bool = False) -> Iterator[str]:
    """Measure `rounds` steps after a first one, with and without activation checkpointing; yield a table in Markdown.

    Without `config`: the published shapes on CUDA, tiny ones on the CPU. With `vision.tokens` tissue each is measured
    with all tokens too. On CUDA, `train.attention=auto` measures each kernel, the first also at the largest micro-batch
    found to fit. `plain` adds the two steps of `mama.bench.plain_step`. Each row is measured in a process of its own,
    whose peak memory is then its own. Raises `ConfigError` in a rank.
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
        "| step | attention | activation checkpointing | micro-batch | tokens an image | pairs/s | text tokens/s "
        "| peak memory, GiB | estimated, GiB | MFU in bf16 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    only_tissue = config.vision.tokens == "tissue"
    for number, setting in enumerate(_each_kernel(config, cuda)):
        function = measure_to_the_largest if cuda and not number else measure
        for tokens_of in ("all", "tissue") if only_tissue else ("all",):
            one = replace(config, train=setting, vision=replace(config.vision, tokens=tokens_of))
            yield from _both(function, f"mama, {tokens_of} tokens | {setting.attention}", one, rounds)
    if plain:
        text = replace(config.text, sentences="separator")  # as the plain steps read them, whatever the rows above do
        config = replace(config, vision=replace(config.vision, tokens="all"), text=text)
        yield from _both(measure_plain, "plain | sdpa", config, rounds)
        published_code = partial(measure_plain, as_published=True)
        yield from _both(published_code, "published | sdpa, text eager", config, rounds)


def _each_kernel(config: Config, cuda: bool) -> list[TrainConfig]:
    """The configured kernel; xformers and then PyTorch's if `auto` would choose xformers."""
    train = config.train
    if train.attention != "auto":
        return [train]
    both = [replace(train, attention="xformers"), replace(train, attention="sdpa")]
    # In a process of its own, since a trial of xformers takes GPU memory.
    xformers = cuda and run_on_ranks(_chosen, replace(config, train=TrainConfig())) == attention.KERNELS["xformers"]
    return both if xformers else both[1:]


def _chosen(config: Config) -> str:
    return attention.choose_both(config, torch.device("cuda"))[0]


def _both(function: Callable[[Config], list[Measured]], step: str, config: Config, rounds: int) -> Iterator[str]:
    """Yield the rows without and with activation checkpointing; `step` fills the first two columns."""
    pairs, tokens = config.train.micro_batch, config.data.max_tokens
    for checkpointing in (False, True):
        train = replace(
            config.train,
            activation_checkpointing=checkpointing,
            global_batch=pairs,
            grad_cache=False,  # of a single micro-batch
            ranks=1,
            steps=rounds + 1,
        )
        label = f"| {step} | {'on' if checkpointing else 'off'}"
        measured = run_on_ranks(function, replace(config, train=train))
        if pairs not in [m.pairs for m in measured]:
            yield f"{label} | {pairs} | | does not fit | | | | |"
        for one in measured:
            yield f"{label} {_row(one, tokens)}"


def measure(config: Config) -> list[Measured]:
    """Measure `train.steps` steps but the first, on one rank; returns nothing if GPU memory does not suffice."""
    return _measured(config, framework_step, lambda found, room: [config.train.micro_batch])


def measure_to_the_largest(config: Config) -> list[Measured]:
    """As `measure`, and also at the largest micro-batch that was found to fit, see `growing`."""
    pairs = config.train.micro_batch
    found = _measured(config, framework_step, lambda found, room: growing(pairs, found, room))
    return [one for one in found if one.pairs == pairs or one is found[-1]]


def measure_plain(config: Config, as_published: bool = False) -> list[Measured]:
    """As `measure`, for the step without this framework, or with the habits of the published code."""
    start = partial(plain_step, as_published=as_published)
    found = _measured(config, start, lambda found, room: [config.train.micro_batch])
    return [replace(one, estimate_gb=None) for one in found]  # the estimate is for our step


def growing(pairs: int, found: list[Measured], room_gb: float) -> Iterator[int]:
    """Yield micro-batch sizes to try: a quarter and half of `pairs`, `pairs`, then larger ones, until the caller stops.

    Each goes seven eighths of the way to the size that would fill `room_gb` GiB, by the parabola through the last three
    measurements in `found` (scores of all pairs with each other grow by the square), at least a sixteenth further and
    at most twice as far. Few are tried, since a large one takes seconds.
    """
    yield from sorted({max(1, pairs // 4), max(1, pairs // 2), pairs, max(2, pairs)})
    while True:
        last = found[-1].pairs
        step = int(min(7 * _room_for(found[-3:], room_gb) / 8, last))
        yield last + max(1, last // 16, step)


def _room_for(found: list[Measured], room_gb: float) -> float:
    """How many more pairs than in the last of two or three measurements fill `room_gb`; infinite where none grew."""
    *earlier, (n1, m1), (n2, m2) = [(one.pairs, one.memory_gb) for one in found]
    slope, bend = (m2 - m1) / (n2 - n1), 0.0
    for n0, m0 in earlier:
        bend = max(0.0, (slope - (m1 - m0) / (n1 - n0)) / (n2 - n0))
    slope += bend * (n2 - n1)  # at n2
    if slope <= 0:
        return math.inf
    left = max(0.0, room_gb - m2)
    return 2 * left / (slope + math.sqrt(slope**2 + 4 * bend * left))


def _measured(
    config: Config,
    start: Callable[[Config, Tokenizer, torch.device], Step],
    sizes: Callable[[list[Measured], float], Iterable[int]],
) -> list[Measured]:
    """Start one model and measure it at micro-batches of `sizes(found, room in GiB)`, until one does not fit."""
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
    """Return the training step of `mama train`, for a model under its engine."""
    with device:  # on a CPU, random numbers for billions of parameters take minutes
        model = build(config, tokenizer, *attention.choose_both(config, device))
    prepare_blocks(model, config.train, device)
    engine = start_engine(model, config)
    engine.train()

    number = config.loss.local_start + 1  # a step at which every term counts, and none starts
    return lambda batch: training_step(engine, [batch], config, number).total


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
    lengths = _image_tokens(batch, config, shape)
    share = (statistics.mean(lengths) - shape.vision.prefix) / shape.vision.patches_of(config.data.image_size)
    flops = pair_flops(
        shape,
        config.data.image_size,
        batch.texts.lengths,
        images=lengths,
        sentences=batch.texts.separators.shape[1],
        alone=batch.texts.sentences.lengths if shape.reads_alone else (),
    )
    checkpointed = config.train.activation_checkpointing is True
    data = replace(config.data, pairs=["augment"], pair_weights=[])  # one text serves both views of a synthetic pair
    return Measured(
        config.train.micro_batch,
        statistics.median(seconds[1:]),
        peak_memory_gb(device),
        statistics.mean(lengths),
        flops,
        peak_flops(device),
        rank_bytes(replace(config, data=data), shape, 1, checkpointed, share=share)[0] / 2**30,
    )


def _image_tokens(batch: Batch, config: Config, shape: MamaModel) -> list[int]:
    """The tokens of each augmented image of a batch that the image tower encodes."""
    if config.vision.tokens == "all":
        return [shape.vision.prefix + shape.vision.patches_of(config.data.image_size)]
    views = (batch.anchors, batch.anchor_changes), (batch.partners, batch.partner_changes)
    kept = [kept_patches(augment.apply(images, changes), shape.vision.patch).sum(1) for images, changes in views]
    return [shape.vision.prefix + count for count in torch.cat(kept).tolist()]


def _row(one: Measured, tokens: int) -> str:
    mfu = "unknown" if one.mfu is None else f"{one.mfu:.1%}"
    estimate = "" if one.estimate_gb is None else f"{one.estimate_gb:.2f}"
    rates = f"{one.rate:.3g} | {one.rate * tokens:,.0f}"
    return f"| {one.pairs} | {one.image_tokens:,.0f} | {rates} | {one.memory_gb:.2f} | {estimate} | {mfu} |"


def _memory_of(device: torch.device) -> float:
    """GiB that a micro-batch may fill; 0 on the CPU, where no largest one is searched."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
