"""Large contrastive batches by gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size").

The loss needs the embeddings of all pairs at once, the towers do not: encode the micro-batches without a graph, take
the gradient of the loss with respect to their embeddings, then encode each micro-batch again and backpropagate its
part of that gradient. Seeding before each encoding replays dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mama.data.batches import Batch
from mama.model.mama_model import Embeddings
from mama.objective.losses import objective
from mama.settings.schema import LossConfig
from mama.train.zero_state import DeepSpeedEngine

SCALES = ("scale", "local_scale")
PADDED = ("sentences", "sentence_mask", "finding_mask", "patches", "patch_mask")


def backward(
    engine: DeepSpeedEngine, batches: Sequence[Batch], seed: Callable[[int], None], config: LossConfig, step: int
) -> tuple[Tensor, dict[str, Tensor], Embeddings]:
    """Accumulate the gradients of the objective over the `batches` of all ranks, as if they were one micro-batch.

    `seed(n)` seeds the dropout of micro-batch n. The engine's step that updates is left to the caller. Returns
    total, terms, and the joint embeddings of this rank.
    """
    with torch.no_grad():
        parts = []
        for n, batch in enumerate(batches):
            seed(n)
            parts.append(engine(batch))
    joint = _join(parts)
    leaves = _leaves(joint)
    total, terms = objective(joint, config, step)
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
    start = 0
    for n, batch in enumerate(batches):
        seed(n)
        if n:
            engine.step()  # of the micro-batch before: it counts, and does not update
        engine.backward(_surrogate(engine(batch), gradients, start, len(batches)))
        start += len(batch.keys)
    return total.detach(), {name: term.detach() for name, term in terms.items()}, joint


def _join(parts: Sequence[Embeddings]) -> Embeddings:
    """Concatenate embeddings, padding sentences to the longest text and patches to the image with most of them.

    The scales are equal in all parts.
    """
    joined = {}
    for name in Embeddings._fields:
        values = [getattr(part, name) for part in parts]
        if name in SCALES or values[0] is None:
            joined[name] = values[0]
            continue
        if name in PADDED:
            most = max(v.shape[1] for v in values)
            values = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, most - v.shape[1])) for v in values]
        joined[name] = torch.cat(values)
    return Embeddings(**joined)


def _leaves(joint: Embeddings) -> dict[str, Tensor]:
    """Let the floating tensors require gradients, as leaves; returns them by name."""
    tensors = joint._asdict().items()
    return {name: x.requires_grad_() for name, x in tensors if x is not None and x.is_floating_point()}


def _surrogate(part: Embeddings, gradients: Mapping[str, Tensor | None], start: int, count: int) -> Tensor:
    """Return a scalar whose gradient is this micro-batch's part of `gradients`; DeepSpeed divides it by `count`."""
    terms = []
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        value = getattr(part, name)
        if name in SCALES:  # shared by all micro-batches
            terms.append(value * gradient)
        else:
            part_of = gradient[start : start + len(value), : value.shape[1]]  # without its padding
            terms.append(count * (value * part_of).sum())
    return torch.stack(terms).sum()
