"""Large contrastive batches by gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size").

The loss needs the embeddings of all pairs at once, the towers do not need all pairs at once: encode the
micro-batches without a graph, take the gradient of the loss with respect to their embeddings, then encode
each again and hand it its share of that gradient. Dropout is replayed by seeding before each encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mama.data.batches import Batch
from mama.model.mama_model import Embeddings
from mama.objective.losses import objective
from mama.settings.schema import LossConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SCALES = ("scale", "local_scale")


def backward(
    engine: DeepSpeedEngine, batches: Sequence[Batch], seed: Callable[[int], None], config: LossConfig, step: int
) -> tuple[Tensor, dict[str, Tensor], Embeddings]:
    """Gradients of the objective over all `batches` of this rank and the others, as of one micro-batch.

    `seed(n)` seeds the dropout of micro-batch n. Leaves the engine in front of the step that updates. Returns
    total, terms, and the joint embeddings.
    """
    with torch.no_grad():
        parts = []
        for n, batch in enumerate(batches):
            seed(n)
            parts.append(engine(batch))
    together = _join(parts)
    leaves = _leaves(together)
    total, terms = objective(together, config, step)
    gradients = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
    start = 0
    for n, batch in enumerate(batches):
        seed(n)
        if n:
            engine.step()  # of the micro-batch before: it counts and does not update
        engine.backward(_surrogate(engine(batch), gradients, start, len(batches)))
        start += len(batch.keys)
    return total.detach(), terms, together


def _join(parts: Sequence[Embeddings]) -> Embeddings:
    """One set of embeddings, its texts padded to the longest; the scales are the same in all."""
    most = max(0 if part.sentence_mask is None else part.sentence_mask.shape[1] for part in parts)
    joined = {}
    for name in Embeddings._fields:
        values = [getattr(part, name) for part in parts]
        if name in SCALES or values[0] is None:
            joined[name] = values[0]
            continue
        if name in ("sentences", "sentence_mask"):
            values = [F.pad(v, (0, 0) * (v.ndim - 2) + (0, most - v.shape[1])) for v in values]
        joined[name] = torch.cat(values)
    return Embeddings(**joined)


def _leaves(together: Embeddings) -> dict[str, Tensor]:
    """The floating tensors by name, from now on leaves that collect gradients."""
    found = {}
    for name, value in together._asdict().items():
        if value is not None and value.is_floating_point():
            found[name] = value.requires_grad_()
    return found


def _surrogate(part: Embeddings, gradients: Mapping[str, Tensor | None], start: int, count: int) -> Tensor:
    """A scalar whose gradient is this micro-batch's share; DeepSpeed will divide it by `count`."""
    terms = []
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        value = getattr(part, name)
        if name in SCALES:  # every micro-batch has the whole scale
            terms.append(value * gradient)
        else:
            share = gradient[start : start + len(value)]
            share = share[:, : value.shape[1]]  # without the padding of sentences; other tensors lose nothing
            terms.append(count * (value * share).sum())
    return torch.stack(terms).sum()
