"""`mama bench consolidate`: `mama consolidate` beside DeepSpeed's `zero_to_fp32`, of the same fully tuned weights."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from mama.bench.checkpoint import GIB, untrained_engine
from mama.bench.synthetic import fully_tuned
from mama.run.files import remove, sync
from mama.runtime.launch import run_on_ranks
from mama.settings.load import load, save
from mama.settings.schema import Config
from mama.train import checkpoint
from mama.train.deepspeed_engine import join_ranks
from mama.train.estimate import parameter_count, shape_of, stand_in
from shards.pack.pack import pack

Measured = tuple[float, int]  # seconds, and bytes of the largest resident memory

# Each in a process of its own, which also says what its imports alone take.
OURS = """
from mama.cli.main import cli
from mama.cli.options import importing
with importing():
    import mama.export.consolidate
{}
"""
THEIRS = "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; {}"


def bench_consolidate(sizes: Sequence[float], stage: int, rounds: int, folder: Path | None) -> Iterator[str]:
    """Measure models of `sizes` billion parameters `rounds` times below `folder`; yield a table in Markdown.

    One engine of two ranks saves both checkpoints, bf16 weights with fp32 ones and Adam's moments in ZeRO, of which
    both write fp32 safetensors, in turn. Before each the files that it reads leave the disk's cache.
    """
    yield "| parameters | written by | GB | seconds | of them imports | peak memory, GiB | above that of imports, GiB |"
    yield "|---|---|---|---|---|---|---|"
    for billions in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            config = _run(billions, stage, Path(place))
            count = run_on_ranks(_save_both, config)
            for name, size, imports, (seconds, memory) in _compared(config, rounds):
                yield (
                    f"| {count / 1e9:.2f} B | {name} | {size / 1e9:.2f} | {seconds:.1f} | {imports[0]:.1f} "
                    f"| {memory / GIB:.2f} | {(memory - imports[1]) / GIB:.2f} |"
                )


def _run(billions: float, stage: int, place: Path) -> Config:
    """Settings, tokenizer and training shards of a run that a checkpoint is missing from."""
    drawn = load("quickstart", [f"pack.root={place}/dicom", f"pack.out={place}/shards", "pack.options.patients=8"])
    pack(drawn.pack)
    config = fully_tuned(billions, 2, stage)
    config = replace(config, runs=str(place), data=replace(config.data, shards=[drawn.pack.out]))
    stand_in(config.text).save(config.run_folder / "tokenizer")
    save(config, config.run_folder / "config.yaml")
    return config


def _save_both(config: Config) -> int:
    """On a rank: write our checkpoint and DeepSpeed's; returns the number of parameters."""
    join_ranks()
    (engine, frozen), run = untrained_engine(config), config.run_folder
    checkpoint.save(engine, run, 1, keep=1, frozen=frozen)
    engine.save_checkpoint(str(run / "deepspeed"), tag="step")
    dist.destroy_process_group()
    return parameter_count(shape_of(config))


def _compared(config: Config, rounds: int) -> Iterator[tuple[str, int, Measured, Measured]]:
    """Yield name, bytes written, the imports alone and the whole, ours and theirs; medians."""
    run = config.run_folder
    read, written = run / "deepspeed", run / "fp32"
    convert = f"convert({str(read)!r}, {str(written)!r}, safe_serialization=True)"
    ways = [
        ("mama consolidate", OURS, f"cli(['consolidate', {str(run)!r}])", run / "checkpoints", run / "model"),
        ("zero_to_fp32", THEIRS, convert, read, written),
    ]
    found: dict[str, list[Measured]] = {name: [] for name, *_ in ways}
    imports: dict[str, list[Measured]] = {name: [] for name, *_ in ways}
    sizes = {}
    for _ in range(rounds):
        for name, code, call, source, out in ways:
            imports[name].append(_process(code.format("")))
            remove(out)
            _forget(source)
            found[name].append(_process(code.format(call)))
            sizes[name] = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
            remove(out)
    for name, *_ in ways:
        yield name, sizes[name], _median(imports[name]), _median(found[name])


def _process(code: str) -> Measured:
    """Run Python code in a process of its own. Raises `RuntimeError` with what it said last, if it failed."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{code}: {said.read().decode(errors='replace')[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def _forget(folder: Path) -> None:
    """Let the disk's cache forget the files of a folder, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)  # what is not written yet cannot be forgotten
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _median(rounds: list[Measured]) -> Measured:
    return statistics.median(seconds for seconds, _ in rounds), int(statistics.median(memory for _, memory in rounds))
