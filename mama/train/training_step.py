"""The training step: gradients of this rank's micro-batches, then one update; training and benchmarks share it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mama.data.batches import Batch
from mama.model.mama_model import Embeddings
from mama.objective.losses import first_steps, objective
from mama.runtime.collectives import rank, world_size
from mama.settings.schema import Config
from mama.train import grad_cache
from mama.train.optimizer import set_rates
from mama.train.zero_state import DeepSpeedEngine, adam, adam_tensors, is_plain


class Update(NamedTuple):
    """The results of one step; loss and embeddings are those of its last contrastive batch."""

    taken: bool  # False: a gradient was not finite, and all ranks skipped the update
    rates: dict[str, float]  # learning rate by tower
    total: Tensor  # the objective, 0-d
    terms: dict[str, Tensor]  # each 0-d
    embeddings: Embeddings


def training_step(engine: DeepSpeedEngine, batches: Sequence[Batch], config: Config, step: int) -> Update:
    """Take step number `step` by all micro-batches of this rank, which are on the device; every rank must call it."""
    rates = _prepare(engine, config, step)
    total, terms, embeddings = _backward(engine, batches, config, step)
    return Update(step_if_finite(engine), rates, total, terms, embeddings)


def _prepare(engine: DeepSpeedEngine, config: Config, step: int) -> dict[str, float]:
    """Set every learning rate for `step`, and start the terms whose first step it is. Returns rates by tower."""
    for term, start in first_steps(config.loss).items():
        if step == start > 0:
            _restart_adam(engine, term)
    return set_rates(adam(engine).param_groups, step, config.train.steps, config.optim, config.loss)


def _restart_adam(engine: DeepSpeedEngine, term: str) -> None:
    """Set Adam's step count of a term's heads to 0.

    The steps before, at gradient 0, have used up the bias correction of the moments: the first updates would be
    several times the learning rate.
    """
    state = adam(engine).state
    for group, tensor in adam_tensors(engine):
        if group["term"] == term:
            state[tensor]["step"].zero_()


def _backward(
    engine: DeepSpeedEngine, batches: Sequence[Batch], config: Config, step: int
) -> tuple[Tensor, dict[str, Tensor], Embeddings]:
    """Accumulate the gradients of all micro-batches, up to the engine's step that updates."""
    seed = partial(seed_dropout, config.seed, step)
    if config.train.grad_cache:
        return grad_cache.backward(engine, batches, seed, config.loss, step)
    for n, batch in enumerate(batches):
        if n:
            engine.step()  # of the micro-batch before: it counts, and does not update
        seed(n)
        embeddings = engine(batch)
        total, terms = objective(embeddings, config.loss, step)
        engine.backward(total)
    return total.detach(), {name: term.detach() for name, term in terms.items()}, embeddings


def seed_dropout(seed: int, step: int, n: int) -> None:
    """Dropout is a function of (seed, step, micro-batch `n`), so that a resumed run draws the same masks."""
    place = n * world_size() + rank()
    torch.manual_seed(int(np.random.SeedSequence([seed, step, place]).generate_state(1)[0]))


def step_if_finite(engine: DeepSpeedEngine) -> bool:
    """Take the engine's step at the end of accumulation; False, on all ranks, if a gradient is not finite.

    ZeRO checks that itself and skips. PyTorch's optimizer does not; it passes over parameters without a gradient.
    """
    if not is_plain(engine):
        engine.step()
        return not engine.optimizer.overflow
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = bool(norm.isfinite())
    if not finite:
        for parameter in parameters:
            parameter.grad = None
        engine.gradient_clipping = lambda: 0.0  # DeepSpeed cannot clip without gradients
    engine.step()
    engine.__dict__.pop("gradient_clipping", None)
    engine._global_grad_norm = norm  # ZeRO's optimizers report it to the engine, PyTorch's does not
    return finite
