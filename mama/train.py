"""Training: one loop, the same on a laptop and on a cluster."""

from __future__ import annotations

import logging
import os
import resource
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mama import attention, augment, checkpoint, gradcache, stop
from mama.config import Config
from mama.data import Batch, training_batches
from mama.dist import any_rank, barrier, rank, world_size
from mama.engine import DeepSpeedEngine, GradientNorms, forget_idle_steps, join_ranks, start_engine, step_if_finite
from mama.errors import StoppedError, TrainingError
from mama.frozen import FirstStep, digests
from mama.launch import run_on_ranks
from mama.losses import objective, positives, retrieval_accuracy
from mama.model import Embeddings, build
from mama.monitor import Monitor
from mama.optim import set_rates, starts
from mama.run import prepare
from mama.tokens import Tokenizer
from shards.progress import progress

log = logging.getLogger(__name__)


def train(config: Config) -> Path:
    """Train, or resume, the run of `config`; returns its folder. Run again, it continues.

    Raises `StoppedError` where a signal ended it: everything is saved.
    """
    reached = run_on_ranks(train_rank, config)
    if reached < config.train.steps:
        raise StoppedError(f"a signal ended it after {reached} of {config.train.steps} steps; run it again to continue")
    return config.run_folder


def train_rank(config: Config) -> int:
    """What every rank does; returns the steps that have been taken."""
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING, format="%(message)s"
    )
    for library in ("transformers", "torch"):  # their deprecations are no news to who trains
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    stop.listen()
    device = join_ranks()
    if rank() == 0:
        prepare(config)
    barrier()
    run = config.run_folder
    tokenizer = Tokenizer.load(run / "tokenizer")
    model = build(config, tokenizer, attention.choose(config.train.attention, device))
    frozen = digests(model)
    resumed = checkpoint.newest(run)
    if resumed:
        checkpoint.load_weights(model, resumed, frozen)
    engine = start_engine(model, config)
    first = 0
    if resumed:
        checkpoint.load_optimizer(engine, resumed)
        first = checkpoint.step_of(resumed)
        log.info("resumed from %s", resumed)
    reached = Training(config, engine, tokenizer, frozen, first).run()
    barrier()
    dist.destroy_process_group()
    return reached


class Training:
    """The loop from step `first` on, with what it carries from step to step."""

    def __init__(
        self, config: Config, engine: DeepSpeedEngine, tokenizer: Tokenizer, frozen: dict[str, str], first: int
    ) -> None:
        self.config, self.engine, self.tokenizer, self.frozen = config, engine, tokenizer, frozen
        self.steps = range(first, config.train.steps)
        self.batches = training_batches(config, tokenizer, self.steps, rank(), world_size())
        self.monitor = Monitor(config.run_folder, first) if rank() == 0 else None
        self.norms = GradientNorms(engine, config.optim.clip_norm)
        self.skipped = self.skipped_in_a_row = 0  # steps whose gradient was not finite

    def run(self) -> int:
        """Returns the number of the step behind the last one taken."""
        first_step = FirstStep(self.engine) if self.steps else None
        taken = self.steps.start
        for step in _shown(self.steps):
            self._step(step)
            if first_step:
                first_step.check()
                first_step = None
            taken = step + 1
            stopping = any_rank(stop.told(), self.engine.device)
            if taken % self.config.train.save_every == 0 or taken == self.config.train.steps or stopping:
                self._save(taken)
            if stopping:
                break
        if self.monitor:
            self.monitor.close()
        return taken

    def _step(self, step: int) -> None:
        """One update by `global_batch` pairs."""
        config = self.config
        for term, start in starts(config.loss).items():
            if step == start > 0:
                forget_idle_steps(self.engine, term)
        rates = set_rates(self.engine.optimizer.param_groups, step, config.train.steps, config.optim, config.loss)
        self.norms.clear()
        started = time.perf_counter()
        micro_batches = [next(self.batches) for _ in range(config.train.accumulation(world_size()))]
        waited = time.perf_counter() - started
        micro_batches = [batch.to(self.engine.device) for batch in micro_batches]
        if self.monitor and step == 0:
            _show_first_pair(self.monitor, micro_batches[0])
        total, terms, embeddings = self._backward(micro_batches, step)
        self._update(step, [key for batch in micro_batches for key in batch.keys])
        if step % config.train.log_every == 0 or step == self.steps[-1]:
            values: dict[str, Tensor | float] = {
                "loss/total": total,
                **{f"loss/{name}": term.detach() for name, term in terms.items()},
                **{f"lr/{tower}": rate for tower, rate in rates.items()},
                "data_wait_share": waited / (time.perf_counter() - started),
            }
            self._log(step, values, embeddings)

    def _backward(self, batches: list[Batch], step: int) -> tuple[Tensor, dict[str, Tensor], Embeddings]:
        """Gradients of all micro-batches, up to the engine's step that updates. Returns the last one's values."""
        config, engine = self.config, self.engine

        def seed(n: int) -> None:
            """Dropout is a function of (seed, step, micro-batch), so that a resumed run draws the same."""
            place = n * world_size() + rank()
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, place]).generate_state(1)[0]))

        if config.train.grad_cache:
            return gradcache.backward(engine, batches, seed, config.loss, step)
        for n, batch in enumerate(batches):
            if n:
                engine.step()  # of the micro-batch before: it counts and does not update
            seed(n)
            embeddings = engine(batch)
            total, terms = objective(embeddings, config.loss, step)
            engine.backward(total)
        return total.detach(), terms, embeddings

    def _update(self, step: int, keys: list[str]) -> None:
        """The engine's step, unless loss or gradient is not finite: then all ranks pass over it."""
        if step_if_finite(self.engine):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if rank() == 0:
            log.warning("step %d: loss or gradient is not finite; the step is skipped", step)
        if self.skipped_in_a_row >= self.config.train.max_skips:
            raise TrainingError(
                f"step {step}: loss or gradient was not finite in {self.skipped_in_a_row} steps in a row; this rank's "
                f"samples: {', '.join(keys)}"
            )

    def _log(self, step: int, values: dict[str, Tensor | float], e: Embeddings) -> None:
        """Complete the values of a step and write them; every rank must call it."""
        targets = positives(e.text_ids, same_text=self.config.loss.positives == "text")
        to_text, to_image = retrieval_accuracy(e.anchor.detach(), e.anchor_text.detach(), targets)
        total = float(self.engine.get_global_grad_norm() or 0.0)
        values |= {
            "accuracy/image_to_text": to_text,
            "accuracy/text_to_image": to_image,
            "scale/global": e.scale.detach(),
            "scale/local": e.local_scale.detach(),
            "scale/largest": self.config.loss.max_scale,
            "grad_norm/total": total,
            **{f"grad_norm/{tower}": norm for tower, norm in self.norms.read(total).items()},
            "skipped_steps": self.skipped,
            "memory_gb": _peak_memory_gb(self.engine.device),
        }
        if self.monitor:
            numbers = {name: float(value) for name, value in values.items()}
            self.monitor.log(step, numbers, self.config.train.global_batch)

    def _save(self, taken: int) -> None:
        checkpoint.save(self.engine, self.config.run_folder, taken, self.config.train.keep_checkpoints, self.frozen)


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
