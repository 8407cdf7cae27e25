"""Profile five training steps of the published shapes, or of tiny ones without CUDA.

`python tests/gpu/profile_step.py FOLDER` prints the operators by time, and writes FOLDER/trace.json.gz
for chrome://tracing or Perfetto.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mama.bench.step import framework_step
from mama.bench.synthetic import published, synthetic, tiny
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from mama.train.deepspeed_engine import join_ranks
from mama.train.estimate import stand_in

WARM, STEPS, ROWS = 2, 5, 40
LARGEST = 15 * 2**20  # bytes of a trace that is kept


def profiled(config: Config) -> str:
    """On one rank: five steps behind two, as a table; the trace goes to the folder that is the run's."""
    device = join_ranks()
    cuda = device.type == "cuda"
    tokenizer = stand_in(config.text)
    batch, step = synthetic(config, tokenizer).to(device), framework_step(config, tokenizer, device)
    for _ in range(WARM):
        step(batch)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    started = time.perf_counter()
    with profile(activities=kinds) as found:
        for _ in range(STEPS):
            step(batch)
        if cuda:
            torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / STEPS
    print(f"{seconds:.3f} s a step under the profiler, {config.train.micro_batch} pairs", flush=True)
    print(
        found.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=ROWS), flush=True
    )
    keep_trace(found, Path(config.runs))
    torch.distributed.destroy_process_group()
    return f"profiled {STEPS} steps"


def keep_trace(found: profile, folder: Path) -> None:
    """Compressed; left out where it would be larger than what may be sent home."""
    with tempfile.TemporaryDirectory() as scratch:
        plain, packed = Path(scratch) / "trace.json", Path(scratch) / "trace.json.gz"
        found.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb") as target:
            shutil.copyfileobj(source, target)
        size = packed.stat().st_size
        if size <= LARGEST:
            shutil.copy(packed, folder / "trace.json.gz")
        print(f"trace: {size / 2**20:.1f} MiB{'' if size <= LARGEST else ', too large: left out'}", flush=True)


if __name__ == "__main__":
    shape = published() if torch.cuda.is_available() else tiny()
    pairs = shape.train.micro_batch
    print(run_on_ranks(profiled, replace(shape, runs=sys.argv[1], train=replace(shape.train, global_batch=pairs))))
