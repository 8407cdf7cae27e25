"""Training: one loop, the same on a laptop and on a cluster, for pre-training and for fine-tuning."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mama.data.idle_settings import idle_settings
from mama.data.loader import plain_failures, require_shared_memory
from mama.errors import HungError, LaterError, StoppedError, TrainingError
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import build
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.run.model_state import digests
from mama.run.run_tokenizer import load_tokenizer
from mama.runtime import console, preemption
from mama.runtime.collectives import barrier, max_over_ranks, rank, sum_over_ranks, world_size
from mama.runtime.launch import is_rank, run_on_ranks
from mama.settings.schema import Config
from mama.train import checkpoint, start_check
from mama.train.agreement import prepare_and_agree
from mama.train.capacity import decided, require_capacity
from mama.train.deepspeed_engine import start_engine
from mama.train.estimate import rank_bytes
from mama.train.first_step import FirstStep
from mama.train.hang import judged
from mama.train.heartbeat import Heartbeat
from mama.train.lease import Lease, held
from mama.train.method import Method
from mama.train.monitor import Monitor
from mama.train.pretraining import Pretraining
from shards.progress import progress

log = logging.getLogger(__name__)

PICTURES = 50  # logged steps between two pictures of a pair

T = TypeVar("T")
Work = Callable[[], T]


def train(config: Config) -> Path:
    """Train, or resume, the run of `config`, and return its folder. Called again, it continues.

    Raises `StoppedError` if a signal ended the run, with everything saved, and its job is not requeued.
    """
    steps = config.train.steps
    if not is_rank():
        require_capacity(config)
    try:
        taken = run_on_ranks(train_rank, config)
        if taken < steps:
            raise StoppedError(f"a signal ended it after {taken} of {steps} steps; run it again to continue")
    except StoppedError as error:
        if not goes_on_later(error):
            raise
    return config.run_folder


def goes_on_later(error: StoppedError) -> bool:
    """Whether the job of a run that `error` has stopped is back in the queue; the process may end instead."""
    return preemption.requeue_later() if isinstance(error, LaterError) else preemption.let_cluster_requeue()


def train_rank(config: Config) -> int:
    """Train on this rank, and return how many steps the run has taken since its first start."""
    return on_rank(config, lambda *place: _start(config, *place).run)


def on_rank(config: Config, prepare: Callable[[torch.device, Lease | None, Heartbeat], Work[T]]) -> T:
    """Meet the other ranks, `prepare`, and return the result of the work that it returns; every rank must call it.

    The lease and the heartbeats are in the run folder of `config`. A signal ends this process at once until the work
    begins, and is then recorded.
    """
    console.configure_logging()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # for developers of PyTorch
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)  # fp32 is intended
    preemption.record_signals()
    place, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    limit, patience = config.train.timeout, 60 * config.train.patience
    heartbeat = Heartbeat(config.run_folder, place, ranks, limit, not config.data.workers, patience)
    try:
        with ExitStack() as stack:
            stack.enter_context(heartbeat.watching())
            lease = stack.enter_context(held(config.run_folder)) if place == 0 else None
            stack.enter_context(plain_failures())
            stack.enter_context(heartbeat.explaining())
            with preemption.ending_at_once():
                images = 2 * config.train.micro_batch * (2 if config.train.validate_every else 1)
                require_shared_memory(config, images, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
                device = start_check.join(config, heartbeat)
                work = prepare(device, lease, heartbeat)
            result = work()
            barrier()
            dist.destroy_process_group()
            return result
    except HungError as error:
        raise judged(config.run_folder, heartbeat.step, str(error)) from error


def _start(config: Config, device: torch.device, lease: Lease | None, heartbeat: Heartbeat) -> Training:
    """Prepare the run folder, build the model and start its engine, all from the newest checkpoint if there is one."""
    heartbeat.doing("preparing the run folder")
    resumed = prepare_and_agree(config)
    tokenizer = load_tokenizer(config.run_folder)
    if rank() == 0:
        heartbeat.doing("looking for findings in the shards")
        for line in idle_settings(config, fetch=True):
            log.warning("%s", line)
    heartbeat.doing("building the model")
    model = build(config, tokenizer, *attention.choose_both(config, device))
    on_gpu = device.type == "cuda"
    need, host = rank_bytes(config, model, world_size(), checkpointed=False, mask=1 if on_gpu else 4)
    config = decided(config, need if on_gpu else need + host, device)
    prepare_blocks(model, config.train, device)
    frozen = digests(model)
    heartbeat.doing("starting the engine")
    if resumed:
        checkpoints.load_weights(model, resumed, frozen)
    engine = start_engine(model, config)
    if resumed:
        checkpoint.load_optimizer(engine, resumed)
        log.info("resumed from %s", resumed)
    return Training(config, Pretraining(config, engine, tokenizer, frozen), resumed, lease, heartbeat)


class Training:
    """The training loop of one rank, from the first step or from a checkpoint, and what it carries between steps."""

    def __init__(
        self,
        config: Config,
        method: Method,
        resumed: Path | None,
        lease: Lease | None,
        heartbeat: Heartbeat,
        before: int = 0,
    ) -> None:
        """`before`: steps of the trainings that share the heartbeat and come first."""
        self.config, self.method, self.engine = config, method, method.engine
        self.lease, self.heartbeat, self.before = lease, heartbeat, before
        marker = read_marker(resumed) if resumed else None
        facts = marker.facts if marker else {}
        self.steps = range(marker.step if marker else 0, config.train.steps)
        self.skipped, self.skipped_in_a_row = facts.get("skipped_steps", 0), 0  # steps with a gradient not finite
        self.corrupt_before = facts.get("corrupt_samples", 0)  # on all ranks
        self.corrupt = 0  # unreadable samples of this rank, since this start
        self.monitor = Monitor(config.run_folder, self.steps.start) if rank() == 0 else None
        # A process killed during validation has saved its checkpoint before, without a score.
        self.lacks_score = marker is not None and marker.score is None and self._is_due(marker.step)
        if self.lacks_score and not method.validates_first:
            self.lacks_score = False
            if rank() == 0:
                log.warning("%s has no validation score, and train.zero_stage=3 cannot add it", resumed)

    def run(self) -> int:
        """Train to the last step, or to the step in which a signal came; returns how many steps the run has taken."""
        taken, last = self.steps.start, self.config.train.steps
        batches = self.method.batches(self.steps)
        with closing(batches):
            if self.monitor:
                self.monitor.hparams(self.config)
            if self.lacks_score:
                self._validate(taken)
            first_step = FirstStep(self.engine) if self.steps else None
            for step in progress(self.steps, len(self.steps), "train", "steps") if rank() == 0 else self.steps:
                if self.method.stops(taken):
                    break
                values = self._step(step, batches)
                self._require_lease()  # before anything is written
                if first_step and step == self.steps.start:
                    first_step.check()
                if self.monitor and values:
                    self.monitor.log(step, values)
                taken = step + 1
                signal, due = self._signal(), self._is_due(taken)
                if taken % self.config.train.save_every == 0 or taken == last or signal or due:
                    self._save(taken)
                if due and (taken == last or not signal):  # after a signal, the next start validates
                    self._validate(taken)
                    signal = self._signal()
                if signal:
                    break
            if self.monitor:
                self.monitor.close()  # not after an error: on a full disk it would raise another, in place of the first
        return taken

    def _signal(self) -> int:
        """Return the signal, if any, that the ranks have received so far, the same on all; every rank must call it."""
        signal = max_over_ranks(preemption.signal_received(), self.engine.device)
        preemption.adopt_request(signal)  # and not to a later one, which the other ranks do not know of
        return signal

    def _is_due(self, taken: int) -> bool:
        """Whether the model is validated after `taken` steps."""
        every = self.config.train.validate_every
        return bool(every) and taken > 0 and (taken % every == 0 or taken == self.config.train.steps)

    def _require_lease(self) -> None:
        if self.lease:
            self.lease.check()

    def _step(self, step: int, batches: Generator[Any]) -> dict[str, float]:
        """Take one step by `global_batch` samples; returns the values to log, none in a step that is not logged."""
        every = self.config.train.log_every
        known = step > self.steps.start  # the first step compiles
        self.heartbeat.step = self.before + step
        self.heartbeat.doing(f"in step {step}, waiting for data", steady=known)
        own = [self.method.fetch(batches) for _ in range(self.config.train.accumulation(world_size()))]
        self.heartbeat.doing(f"in step {step}", steady=known)
        self.corrupt += sum(batch.unreadable for batch in own)
        taken = self.method.step(own, step)
        self._count_skips(taken, step, [key for batch in own for key in batch.keys])
        if step % every and step != self.steps[-1]:
            return {}
        if self.monitor and step % (PICTURES * every) == 0:
            self.method.show(self.monitor, step)
        return {
            **self.method.measure(),
            "skipped_steps": self.skipped,
            "corrupt_samples": self._corrupt(),
            **self.method.throughput(),
        }

    def _count_skips(self, taken: bool, step: int, keys: list[str]) -> None:
        """Raise `TrainingError`, with the samples of all ranks, after `max_skips` skipped steps in a row."""
        if taken:
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

    def _corrupt(self) -> int:
        """Return how many samples were unreadable since the run began, on all ranks; every rank must call it."""
        return self.corrupt_before + sum_over_ranks(self.corrupt, self.engine.device)

    def _validate(self, taken: int) -> None:
        """Validate after `taken` steps; log it, and score the checkpoint of that step. Every rank must call it."""
        self.heartbeat.doing(f"validating after {taken} steps")
        found, score = self.method.validate(taken)
        self._require_lease()
        if self.monitor:
            self.monitor.log(taken - 1, found)
            checkpoint.add_score(self.config.run_folder, taken, score, self.config.train.keep_checkpoints)

    def _save(self, taken: int) -> None:
        """Write the checkpoint after `taken` steps; every rank must call it."""
        self.heartbeat.doing(f"saving after {taken} steps")
        self._require_lease()
        facts = {**self.method.facts, "skipped_steps": self.skipped, "corrupt_samples": self._corrupt()}
        run, keep = self.config.run_folder, self.config.train.keep_checkpoints
        try:
            checkpoint.save(self.engine, run, taken, keep, self.method.frozen, facts)
        except OSError as error:
            raise TrainingError(
                f"{run}: the checkpoint of step {taken} cannot be written ({error}); free disk space and run again: it "
                "continues from the last complete checkpoint"
            ) from error
