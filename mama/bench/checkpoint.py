"""`mama bench checkpoint`: how long all ranks stand still to save a fully tuned model, and the memory it takes."""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from mama.bench.synthetic import fully_tuned
from mama.run.model_state import digest_of
from mama.runtime.collectives import barrier, rank, world_size
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from mama.train import checkpoint
from mama.train.deepspeed_engine import join_ranks, start_engine
from mama.train.estimate import parameter_count, shape_of
from mama.train.zero_state import DeepSpeedEngine

GIB = 2**30


@dataclass(frozen=True)
class Saved:
    """One way to save, on all ranks."""

    seconds: float  # median of the rounds, from the first rank's start to the last one's end
    bytes: int  # on disk
    more_memory: list[int]  # bytes by rank: the largest resident memory while saving, less that before


def bench_checkpoint(
    sizes: Sequence[float], ranks: int, stages: Sequence[int], rounds: int, folder: Path | None
) -> Iterator[str]:
    """Measure models of `sizes` billion parameters `rounds` times below `folder`; yield a table in Markdown.

    Beside ours stands DeepSpeed's own `save_checkpoint`, whose files only as many ranks can read, in turn with it.
    The rank's bf16 weights and its part of AdamW's state stay in memory: about 2 + 12 / ranks bytes a parameter.
    """
    yield "| parameters | ZeRO stage | ranks | saved by | GB | seconds | GB/s | more memory of a rank, GiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for billions in sizes:
        for stage in stages:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                config = fully_tuned(billions, ranks, stage)
                config = replace(config, runs=place, train=replace(config.train, steps=rounds))
                count, *both = run_on_ranks(measure, config)
            for name, saved in zip(("mama", "DeepSpeed"), both, strict=True):
                memory = ", ".join(f"{more / GIB:.2f}" for more in saved.more_memory)
                yield (
                    f"| {count / 1e9:.2f} B | {stage} | {ranks} | {name} | {saved.bytes / 1e9:.2f} "
                    f"| {saved.seconds:.1f} | {saved.bytes / 1e9 / saved.seconds:.2f} | {memory} |"
                )


def measure(config: Config) -> tuple[int, Saved, Saved]:
    """On a rank: the number of parameters, then ours and DeepSpeed's, one after the other in each round."""
    join_ranks()
    (engine, frozen), run = untrained_engine(config), Path(config.runs)
    ways: list[Callable[[], None]] = [
        lambda: checkpoint.save(engine, run, 1, keep=1, frozen=frozen),
        lambda: engine.save_checkpoint(str(run / "deepspeed"), tag="step"),
    ]
    count = parameter_count(shape_of(config), trainable=True)
    rounds = [[_measured(way, run) for way in ways] for _ in range(config.train.steps)]
    dist.destroy_process_group()
    ours, theirs = (_median([found[n] for found in rounds]) for n in range(2))
    return count, ours, theirs


def untrained_engine(config: Config) -> tuple[DeepSpeedEngine, dict[str, str]]:
    """An engine that has never seen a batch, and the digests of its frozen weights.

    Trained weights are random, in bf16, from which the engine makes fp32 ones; frozen ones (the image tower's mask
    token) are 0, as in the model that `build` returns.
    """
    model = shape_of(config).to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.requires_grad:
            tensor.data.uniform_(-0.1, 0.1, generator=generator)
        else:
            tensor.zero_()
    frozen = {name: digest_of(p.float()) for name, p in model.named_parameters() if not p.requires_grad}
    return start_engine(model, config), frozen


def _measured(save: Callable[[], None], run: Path) -> Saved:
    gc.collect()
    barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory counts from here
    before = _memory("VmRSS")
    barrier()
    started = time.perf_counter()
    save()
    barrier()
    seconds, more = time.perf_counter() - started, _memory("VmHWM") - before
    of_all = [0] * world_size()
    dist.all_gather_object(of_all, more)
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    barrier()
    if rank() == 0:  # the next round would otherwise hold two
        for path in run.iterdir():
            shutil.rmtree(path)
    barrier()
    return Saved(seconds, size, of_all)


def _memory(field: str) -> int:
    """Bytes of this process by /proc/self/status."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field))
    return int(line.split()[1]) * 1024


def _median(rounds: list[Saved]) -> Saved:
    memory = [max(of_rank) for of_rank in zip(*(one.more_memory for one in rounds), strict=True)]
    return Saved(statistics.median(one.seconds for one in rounds), rounds[0].bytes, memory)
