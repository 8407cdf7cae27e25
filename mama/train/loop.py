"""Training: one loop, the same on a laptop and on a cluster."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from mama.data import augment
from mama.data.batches import Batch, training_batches
from mama.data.loader import plain_failures, require_shared_memory
from mama.data.tokenizer import Tokenizer
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import Embeddings, build
from mama.objective.losses import objective, positives, retrieval_accuracy
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.run.model_state import digests
from mama.run.run_folder import load_tokenizer
from mama.runtime import console, preemption
from mama.runtime.collectives import barrier, max_over_ranks, rank, sum_over_ranks, world_size
from mama.runtime.errors import LaterError, StoppedError, TrainingError
from mama.runtime.launch import is_rank, run_on_ranks
from mama.settings.schema import Config
from mama.train import checkpoint, grad_cache
from mama.train.agreement import prepare_and_agree
from mama.train.capacity import require_capacity
from mama.train.deepspeed_engine import (
    DeepSpeedEngine,
    GradientNorms,
    join_ranks,
    prepare_step,
    start_engine,
    step_if_finite,
)
from mama.train.first_step import FirstStep
from mama.train.heartbeat import Heartbeat
from mama.train.lease import Lease, held
from mama.train.monitor import Meter, Monitor, sentences_of
from mama.train.validation import HeldOut, validate
from shards.progress import progress

log = logging.getLogger(__name__)

PICTURES = 50  # logged steps between two pictures of a pair


def train(config: Config) -> Path:
    """Train, or resume, the run of `config`; returns its folder. Run again, it continues.

    Raises `StoppedError` where a signal ended it and no job goes back in the queue: everything is saved.
    """
    steps = config.train.steps
    if not is_rank():
        require_capacity(config)
    try:
        reached = run_on_ranks(train_rank, config)
        if reached < steps:
            raise StoppedError(f"a signal ended it after {reached} of {steps} steps; run it again to continue")
    except StoppedError as error:
        if isinstance(error, LaterError):
            preemption.agree(preemption.REQUEUE)
        if not preemption.requeued():
            raise
    return config.run_folder


def train_rank(config: Config) -> int:
    """What every rank does; returns the steps that have been taken."""
    console.start()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # is no news to who trains
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)  # fp32 is meant
    preemption.listen()
    with held(config.run_folder) if os.environ.get("RANK", "0") == "0" else nullcontext() as lease:
        device = join_ranks(config.train.timeout)
        images = 2 * config.train.micro_batch * (2 if config.train.validate_every else 1)
        require_shared_memory(config, images, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        heartbeat = Heartbeat(config.run_folder, rank(), world_size(), config.train.timeout, not config.data.workers)
        barrier()
        with heartbeat.watching(), plain_failures(), heartbeat.explaining():
            return _train_rank(config, device, lease, heartbeat)


def _train_rank(config: Config, device: torch.device, lease: Lease | None, heartbeat: Heartbeat) -> int:
    resumed = prepare_and_agree(config)
    tokenizer = load_tokenizer(config.run_folder)
    model = build(config, tokenizer, attention.choose(config.train.attention, device))
    prepare_blocks(model, config.train, device)
    frozen = digests(model)
    if resumed:
        checkpoints.load_weights(model, resumed, frozen)
    engine = start_engine(model, config)
    if resumed:
        checkpoint.load_optimizer(engine, resumed)
        log.info("resumed from %s", resumed)
    reached = Training(config, engine, tokenizer, frozen, resumed, lease, heartbeat).run()
    barrier()
    dist.destroy_process_group()
    return reached


class Training:
    """The loop from the first step, or from a checkpoint's, with what it carries from step to step."""

    def __init__(
        self,
        config: Config,
        engine: DeepSpeedEngine,
        tokenizer: Tokenizer,
        frozen: dict[str, str],
        resumed: Path | None,
        lease: Lease | None,
        heartbeat: Heartbeat,
    ) -> None:
        self.config, self.engine, self.tokenizer, self.frozen = config, engine, tokenizer, frozen
        self.lease, self.heartbeat = lease, heartbeat
        first = checkpoints.step_of(resumed) if resumed else 0
        self.steps = range(first, config.train.steps)
        self.monitor = Monitor(config.run_folder, first) if rank() == 0 else None
        self.meter = Meter(engine.module, config.data.image_size, engine.device)
        if config.train.validate_every:
            HeldOut(config)  # that there is nothing to validate on is told before the first step
        self.norms = GradientNorms(engine, config.optim.clip_norm)
        facts = checkpoints.facts_of(resumed) if resumed else {}
        # A process that was killed while it validated has saved before, and left no score. ZeRO-3 cannot give one
        # before the first training step: parameters that one module takes from another are not gathered until then.
        missing = resumed is not None and self._is_due(first) and read_marker(resumed).score is None
        self.unscored = missing and config.train.zero_stage < 3
        if missing and not self.unscored and rank() == 0:
            log.warning("%s was not validated, and stays so under train.zero_stage=3", resumed)
        self.skipped, self.skipped_in_a_row = facts.get("skipped_steps", 0), 0  # whose gradient was not finite
        self.corrupt_before = facts.get("corrupt_samples", 0)  # on all ranks
        self.corrupt = 0  # samples of this rank, since this start, that another has replaced

    def run(self) -> int:
        """Returns how many steps have been taken."""
        config = self.config
        device = self.engine.device
        with closing(training_batches(config, self.tokenizer, self.steps, rank(), world_size(), device)) as batches:
            return self._loop(batches)

    def _loop(self, batches: Iterator[Batch]) -> int:
        if self.monitor:
            self.monitor.hparams(self.config)
        if self.unscored:
            self._validate(self.steps.start)
        first_step = FirstStep(self.engine) if self.steps else None
        every = self.config.train
        for step in _shown(self.steps):
            values = self._step(step, batches)
            if self.lease:
                self.lease.check()  # before anything is written
            if first_step:
                first_step.check()
                first_step = None
            taken, last = step + 1, step == self.steps[-1]
            if self.monitor and values:
                self.monitor.log(step, values)
            stopping, due = self._stopping(), self._is_due(taken)
            if taken % every.save_every == 0 or last or stopping or due:
                self._save(taken)
            if due and (last or not stopping):  # where it stops, the next start validates
                self._validate(taken)
                stopping = self._stopping()
            if stopping:
                break
        if self.monitor:
            self.monitor.close()
        return taken if self.steps else self.steps.start

    def _stopping(self) -> int:
        """What the ranks were told by now, as all of them know it; every rank must call it."""
        told = max_over_ranks(preemption.told(), self.engine.device)
        preemption.agree(told)  # and not what came since, which the others do not know
        return told

    def _is_due(self, taken: int) -> bool:
        """Is the state after so many steps to be validated?"""
        every = self.config.train.validate_every
        return bool(every) and taken > 0 and (taken % every == 0 or taken == self.config.train.steps)

    def _validate(self, taken: int) -> None:
        """Log how good the state after so many steps is, and note it in its checkpoint; every rank must call it."""
        self.heartbeat.doing(f"validating after {taken} steps")
        found = validate(self.engine.module, self.config, self.tokenizer, self.engine.device)
        if self.lease:
            self.lease.check()
        if self.monitor:
            self.monitor.log(taken - 1, found)
            score = (found["validation/recall_at_5_i2t"] + found["validation/recall_at_5_t2i"]) / 2
            checkpoint.add_score(self.config.run_folder, taken, score, self.config.train.keep_checkpoints)

    def _save(self, taken: int) -> None:
        """A checkpoint after so many steps; every rank must call it."""
        self.heartbeat.doing(f"saving after {taken} steps")
        if self.lease:
            self.lease.check()
        facts = {
            "contrastive_batch": self.config.contrastive_batch(world_size()),
            "skipped_steps": self.skipped,
            "corrupt_samples": self._corrupt(),
        }
        keep = self.config.train.keep_checkpoints
        run = self.config.run_folder
        try:
            checkpoint.save(self.engine, run, taken, keep, self.frozen, facts)
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{run}: the checkpoint of step {taken} cannot be written ({error}); make room and run it again: it "
                "continues from the last complete one"
            ) from error

    def _corrupt(self) -> int:
        """Samples that could not be read since the run began, on all ranks; every rank must call it."""
        return self.corrupt_before + sum_over_ranks(self.corrupt, self.engine.device)

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, float]:
        """One update by `global_batch` pairs; returns what is to be logged, if it is its turn."""
        config = self.config
        rates = prepare_step(self.engine, config, step)
        self.norms.clear()
        self.heartbeat.doing(f"in step {step}, waiting for data")
        own = [self.meter.fetch(batches) for _ in range(config.train.accumulation(world_size()))]
        self.heartbeat.doing(f"in step {step}")
        self.corrupt += sum(batch.skipped for batch in own)
        total, terms, embeddings = self._backward(own, step)
        self._update(step, [key for batch in own for key in batch.keys])
        if step % config.train.log_every and step != self.steps[-1]:
            return {}
        if self.monitor and step % (PICTURES * config.train.log_every) == 0:
            self._show(step, own[-1], embeddings)
        losses = {"loss/total": total, **{f"loss/{name}": term.detach() for name, term in terms.items()}}
        return {
            **_numbers({**losses, **self._measured(embeddings)}),
            **{f"lr/{tower}": rate for tower, rate in rates.items()},
            **self._of_update(),
            **self.meter.read(),
        }

    def _backward(self, batches: list[Batch], step: int) -> tuple[Tensor, dict[str, Tensor], Embeddings]:
        """Gradients of all micro-batches, up to the engine's step that updates. Returns the last one's values."""
        config, engine = self.config, self.engine

        def seed(n: int) -> None:
            """Dropout is a function of (seed, step, micro-batch), so that a resumed run draws the same."""
            place = n * world_size() + rank()
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, place]).generate_state(1)[0]))

        if config.train.grad_cache:
            return grad_cache.backward(engine, batches, seed, config.loss, step)
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
            of_all: list[list[str]] = [keys] * world_size()
            if world_size() > 1:
                dist.all_gather_object(of_all, keys)
            raise TrainingError(
                f"step {step}: loss or gradient was not finite in {self.skipped_in_a_row} steps in a row; the samples "
                f"of the last one: {', '.join(key for keys in of_all for key in keys)}"
            )

    def _measured(self, e: Embeddings) -> dict[str, Tensor]:
        """Of the last contrastive batch; every rank must call it."""
        targets = positives(e.text_ids, same_text=self.config.loss.positives == "text")
        to_text, to_image = retrieval_accuracy(e.anchor.detach(), e.anchor_text.detach(), targets)
        return {
            "accuracy/image_to_text": to_text,
            "accuracy/text_to_image": to_image,
            "scale/global": e.scale.detach(),
            "scale/local": e.local_scale.detach(),
        }

    def _of_update(self) -> dict[str, float]:
        """Of the update that was taken; every rank must call it."""
        norm = self.engine.get_global_grad_norm()
        total = 0.0 if norm is None else float(norm)
        return {
            "scale/largest": self.config.loss.max_scale,
            "grad_norm/total": total,
            **{f"grad_norm/{tower}": norm for tower, norm in self.norms.read(total).items()},
            "skipped_steps": self.skipped,
            "corrupt_samples": self._corrupt(),
        }

    def _show(self, step: int, batch: Batch, e: Embeddings) -> None:
        """The first pair of a micro-batch as the model saw it, with its text, and where its sentences point."""
        assert self.monitor is not None
        anchor = augment.apply(batch.anchors[:1], batch.anchor_changes[:1])[0]
        partner = augment.apply(batch.partners[:1], batch.partner_changes[:1])[0]
        sentences = sentences_of(batch.texts, int(batch.anchor_text[0]), self.tokenizer)
        self.monitor.show_pair(step, anchor, partner, sentences)
        if e.patches is not None and e.sentences is not None:
            first = len(e.patches) - len(batch.keys)  # gradient caching has joined all micro-batches
            maps = e.sentences[first, : len(sentences)] @ e.patches[first].t()
            self.monitor.show_maps(step, anchor, sentences, maps)


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, by one copy from the device."""
    together = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


def _shown(steps: range) -> Iterable[int]:
    """The steps, with a progress bar on rank 0."""
    return progress(steps, len(steps), "train", "steps") if rank() == 0 else steps
