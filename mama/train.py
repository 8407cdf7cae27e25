"""Training: one loop, the same on a laptop and on a cluster."""

from __future__ import annotations

import logging
import os
import resource
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mama import attention, augment, checkpoint
from mama.config import Config
from mama.data import Batch, training_batches
from mama.dist import any_rank, barrier, rank, world_size
from mama.engine import join_ranks, start_engine
from mama.errors import TrainingError
from mama.launch import run_on_ranks
from mama.losses import objective, positives, retrieval_accuracy
from mama.model import Embeddings, build
from mama.monitor import Monitor
from mama.optim import forget_idle_steps, set_rates
from mama.run import prepare
from mama.tokens import Tokenizer
from shards.progress import progress

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Train, or resume, the run of `config`; returns its folder. Run again, it continues."""
    run_on_ranks(train_rank, config)
    return config.run_folder


def train_rank(config: Config) -> None:
    """What every rank does."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s"
    )
    for library in ("transformers", "torch"):  # their deprecations are no news to who trains
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    device = join_ranks()
    if rank() == 0:
        prepare(config)
    barrier()
    run = config.run_folder
    tokenizer = Tokenizer.load(run / "tokenizer")
    model = build(config, tokenizer, attention.choose(config.train.attention, device))
    engine = start_engine(model, config)
    first = checkpoint.resume(engine, run)
    steps = range(first, config.train.steps)
    batches = training_batches(config, tokenizer, steps, rank(), world_size())
    monitor = Monitor(run, first) if rank() == 0 else None
    for step in _shown(steps):
        values = train_step(engine, batches, config, step, monitor)
        if monitor and (step % config.train.log_every == 0 or step == steps[-1]):
            monitor.log(step, {name: float(value) for name, value in values.items()}, config.train.global_batch)
        if (step + 1) % config.train.save_every == 0 or step == steps[-1]:
            checkpoint.save(engine, run, step + 1, config.train.keep_checkpoints)
    if monitor:
        monitor.close()
    barrier()
    dist.destroy_process_group()


def train_step(
    engine: DeepSpeedEngine, batches: Iterator[Batch], config: Config, step: int, monitor: Monitor | None
) -> dict[str, Tensor | float]:
    """One update by `global_batch` pairs; returns what is to be logged, tensors still on the device."""
    # Dropout is a function of (seed, step, rank), so that a resumed run draws the same.
    torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank()]).generate_state(1)[0]))
    if step == config.loss.local_start:
        forget_idle_steps(engine.optimizer)
    rate = set_rates(engine.optimizer.param_groups, step, config.train.steps, config.optim, config.loss)
    started, waited = time.perf_counter(), 0.0
    for _ in range(config.train.accumulation(world_size())):
        asked = time.perf_counter()
        batch = next(batches).to(engine.device)
        waited += time.perf_counter() - asked
        embeddings = engine(batch)
        total, terms = objective(embeddings, batch, config.loss, step)
        if any_rank(not torch.isfinite(total), engine.device):
            raise TrainingError(
                f"step {step}: the loss is {float(total)}; this rank's samples: {', '.join(batch.keys)}"
            )
        engine.backward(total)
        engine.step()
    if monitor and step == 0:
        _show_first_pair(monitor, batch)
    return {
        "loss/total": total.detach(),
        **{f"loss/{name}": term.detach() for name, term in terms.items()},
        **_in_batch_accuracy(embeddings, batch, config),
        "scale/global": embeddings.scale.detach(),
        "scale/local": embeddings.local_scale.detach(),
        "lr": rate,
        "grad_norm": engine.get_global_grad_norm() or 0.0,
        "data_wait_share": waited / (time.perf_counter() - started),
        "memory_gb": _peak_memory_gb(engine.device),
    }


def _in_batch_accuracy(e: Embeddings, batch: Batch, config: Config) -> dict[str, Tensor]:
    targets = positives(batch.text_ids, same_text=config.loss.positives == "text")
    to_text, to_image = retrieval_accuracy(e.anchor.detach(), e.anchor_text.detach(), targets)
    return {"accuracy/image_to_text": to_text, "accuracy/text_to_image": to_image}


def _show_first_pair(monitor: Monitor, batch: Batch) -> None:
    anchor = augment.apply(batch.anchors[:1], batch.anchor_changes[:1])[0]
    partner = augment.apply(batch.partners[:1], batch.partner_changes[:1])[0]
    monitor.show_pair(0, anchor, partner, batch.keys[0])


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _shown(steps: range) -> Iterable[int]:
    """The steps, with a progress bar on rank 0."""
    return progress(steps, len(steps), "train", "steps") if rank() == 0 else steps
