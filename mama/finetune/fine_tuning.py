"""Fine-tuning, as the training loop sees it: labelled images, cross-entropy, and the loss on the split val.

Letters: b images of a micro-batch, n of the split val, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mama.data import augment
from mama.data.held_out import CollateRows, Split
from mama.data.loader import load, to_device
from mama.finetune.images import LabelledBatch, labelled_batches
from mama.finetune.labels import Labels
from mama.finetune.optimizer import set_layer_rates
from mama.model.classifier import log_probabilities
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.runtime.collectives import rank, world_size
from mama.settings.schema import Config
from mama.train.monitor import Monitor
from mama.train.throughput import peak_memory_gb
from mama.train.training_step import seed_dropout, step_if_finite
from mama.train.validation import in_order
from mama.train.zero_state import DeepSpeedEngine, adam

Best = tuple[float, int]  # score, and the step that has it


class FineTuning:
    """The `Method` of a fine-tuning."""

    def __init__(self, config: Config, engine: DeepSpeedEngine, labels: Labels, frozen: dict[str, str]) -> None:
        self.config, self.engine, self.labels, self.frozen = config, engine, labels, frozen
        self.facts: dict[str, int] = {}
        self.validates_first = True
        self.best = best_of(config.run_folder)
        self.values: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self._restart()

    def batches(self, steps: range) -> Generator[LabelledBatch]:
        """See `Method`, as for the other methods."""
        return labelled_batches(self.config, self.labels, steps, self.engine.device)

    def fetch(self, batches: Generator[LabelledBatch]) -> LabelledBatch:
        started = time.perf_counter()
        batch = next(batches).to(self.engine.device)
        self.waited += time.perf_counter() - started
        self.images += len(batch.keys)
        return batch

    def step(self, batches: Sequence[LabelledBatch], step: int) -> bool:
        self.rates = set_layer_rates(adam(self.engine).param_groups, step, self.config)
        losses, right = [], []
        for n, batch in enumerate(batches):
            if n:
                self.engine.step()  # of the micro-batch before: it counts, and does not update
            seed_dropout(self.config.seed, step, n)
            pixels = augment.apply(batch.images, batch.changes, self.engine.module.head.weight.dtype)
            logits = self.engine(pixels)  # [b, K]
            loss = F.cross_entropy(logits, batch.labels)
            self.engine.backward(loss)
            losses.append(loss.detach())
            right.append((logits.detach().argmax(1) == batch.labels).float().mean())
        self.values = {"loss/total": torch.stack(losses).mean(), "accuracy": torch.stack(right).mean()}
        return step_if_finite(self.engine)

    def measure(self) -> dict[str, float]:
        together = torch.stack(list(self.values.values()))
        if world_size() > 1:
            dist.all_reduce(together)
            together /= world_size()
        norm = self.engine.get_global_grad_norm()
        values = dict(zip(self.values, together.tolist(), strict=True))
        return {**values, "grad_norm/total": 0.0 if norm is None else float(norm), **self.rates}

    def throughput(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        found = {
            "images_per_second": self.images * world_size() / seconds,
            "data_wait_share": self.waited / seconds,
            "memory_gb": peak_memory_gb(self.engine.device),
        }
        self._restart()
        return found

    def show(self, monitor: Monitor, step: int) -> None:
        """No picture is logged."""

    def validate(self, taken: int) -> tuple[dict[str, float], float]:
        loss = val_loss(self.engine, self.config, self.labels)
        self.best = max(self.best, (-loss, taken))
        return {"validation/loss": loss}, -loss

    def stops(self, taken: int) -> bool:
        own = self.config.finetune
        return bool(own.patience) and taken - max(self.best[1], 0) >= own.patience * own.validate_every

    def _restart(self) -> None:
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0


def best_of(folder: Path) -> Best:
    """The best score so far and its step, the same on all ranks; minus infinity and 0 if there is none."""
    found: list[Best] = [(float("-inf"), 0)]
    if rank() == 0 and (best := checkpoints.best(folder)) is not None:
        marker = read_marker(best)
        assert marker.score is not None
        found = [(marker.score, marker.step)]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    return found[0]


def val_loss(engine: DeepSpeedEngine, config: Config, labels: Labels) -> float:
    """The cross-entropy on the labelled images of the split val, the mean over classes of the mean over their images.

    As the training images are drawn, every class counts alike. The same on all ranks, which share the images as in
    `mama.train.validation`. Unreadable images are left out.
    """
    split = Split(config, "val", max_unreadable=config.data.max_corrupt)
    ranks, count = world_size(), len(labels.val_rows)
    share = [(rank() + k * ranks) % count for k in range(-(-count // ranks))]
    own = [int(labels.val_rows[n]) for n in share]
    model, device, parts = engine.module, engine.device, []
    options = {"sampler": own, "batch_size": 2 * config.train.micro_batch, "generator": torch.Generator()}
    model.eval()
    try:
        with closing(load(split, config, CollateRows(None, config.data.max_tokens), device, **options)) as batches:
            for pixels, readable, _ in batches:
                shares = log_probabilities(model, augment.normalise(to_device(pixels, device)))  # [b, K]
                parts.append((shares, readable.to(device)))
    finally:
        model.train()
    shares, readable = (in_order(torch.cat(part), count, device) for part in zip(*parts, strict=True))
    return balanced_loss(shares, torch.from_numpy(labels.val_labels).to(device), readable)


def balanced_loss(shares: Tensor, labels: Tensor, readable: Tensor) -> float:
    """Logarithms [n, K] of probabilities, and classes [n] -> minus their mean over the classes, in fp64."""
    losses = -shares.double()[torch.arange(len(labels), device=labels.device), labels]
    kinds = [(labels == k) & readable for k in labels.unique()]
    return float(torch.stack([losses[kind].mean() for kind in kinds if kind.any()]).mean())
