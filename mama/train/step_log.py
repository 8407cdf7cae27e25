"""The values that a training step logs, among them gradient norms, and at times a picture of a training pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mama.data import augment
from mama.data.batches import Batch, Texts
from mama.data.tokenizer import Tokenizer
from mama.model.mama_model import Embeddings
from mama.objective.losses import positives, retrieval_accuracy
from mama.runtime.collectives import world_size
from mama.settings.schema import LossConfig
from mama.train.monitor import Monitor
from mama.train.training_step import Update
from mama.train.zero_state import DeepSpeedEngine, adam, is_plain


class GradientNorms:
    """Sums the squares of the gradients that Adam receives on this rank, by tower."""

    def __init__(self, engine: DeepSpeedEngine, clip_norm: float) -> None:
        self.engine, self.clip_norm = engine, clip_norm
        self.squares: dict[str, Tensor] = {}
        adam(engine).register_step_pre_hook(self._add)

    def _add(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    square = tensor.grad.float().square().sum()
                    known = self.squares.get(group["tower"])
                    self.squares[group["tower"]] = square if known is None else known + square

    def clear(self) -> None:
        """Forget the gradients of the step before."""
        self.squares = {}

    def read(self, total: float) -> dict[str, float]:
        """Return the norms before clipping by tower, given the step's `total` norm; every rank must call it."""
        if not self.squares:
            return {}  # the step was skipped, on all ranks
        names = ("vision", "text", "heads")
        squares = torch.stack([self.squares.get(name, torch.zeros(())).cpu() for name in names])
        squares = squares.to(self.engine.device)
        if world_size() > 1 and not is_plain(self.engine):  # each rank has its own partitions
            dist.all_reduce(squares)
        clipped = max(1.0, total / self.clip_norm) if self.clip_norm else 1.0
        return dict(zip(names, (squares.sqrt() * clipped).tolist(), strict=True))


def measure_batch(update: Update, loss: LossConfig) -> dict[str, float]:
    """Return losses, retrieval accuracies and logit scales of the step's last contrastive batch, then learning rates.

    Every rank must call it.
    """
    e = update.embeddings
    targets = positives(e.text_ids, same_text=loss.positives == "text")
    to_text, to_image = retrieval_accuracy(e.anchor.detach(), e.anchor_text.detach(), targets)
    tensors = {
        "loss/total": update.total,
        **{f"loss/{name}": term for name, term in update.terms.items()},
        "accuracy/image_to_text": to_text,
        "accuracy/text_to_image": to_image,
        "scale/global": e.scale.detach(),
        "scale/local": e.local_scale.detach(),
    }
    return {**to_numbers(tensors), **{f"lr/{tower}": rate for tower, rate in update.rates.items()}}


def measure_gradient(engine: DeepSpeedEngine, norms: GradientNorms) -> dict[str, float]:
    """Return the norms of the step's gradient before clipping, of all and by tower; every rank must call it."""
    norm = engine.get_global_grad_norm()
    total = 0.0 if norm is None else float(norm)
    return {
        "grad_norm/total": total,
        **{f"grad_norm/{tower}": norm for tower, norm in norms.read(total).items()},
    }


def to_numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """Convert 0-d tensors to numbers by a single copy from the device."""
    together = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, together.tolist(), strict=True))


def show_pair(monitor: Monitor, step: int, batch: Batch, e: Embeddings, tokenizer: Tokenizer) -> None:
    """Log the first pair of the micro-batch `batch` as the model saw it: both views, the text, and its alignment.

    `e` are the embeddings of the micro-batch, or of all up to it, as gradient caching joins them.
    """
    anchor = augment.apply(batch.anchors[:1], batch.anchor_changes[:1])[0]
    partner = augment.apply(batch.partners[:1], batch.partner_changes[:1])[0]
    sentences = sentences_of(batch.texts, int(batch.anchor_text_row[0]), tokenizer)
    monitor.show_pair(step, anchor, partner, sentences)
    if e.patches is not None and e.sentences is not None:
        first = len(e.patches) - len(batch.keys)
        cosines = e.sentences[first, : len(sentences)] @ e.patches[first].t()  # [S, P]
        if e.kept is not None:
            kept = e.kept[first]
            found = cosines[:, : int(kept.sum())]
            cosines = found.new_full((len(found), len(kept)), torch.nan)
            cosines[:, kept] = found
        monitor.show_maps(step, anchor, sentences, cosines)


def sentences_of(texts: Texts, row: int, tokenizer: Tokenizer) -> list[str]:
    """Return the sentences of one text as the model reads them, cut to `max_tokens`."""
    ends = texts.separators[row][texts.sentence_mask[row]].tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    tokens = texts.tokens[row].tolist()
    return [str(tokenizer.base.decode(tokens[a:b])).strip() for a, b in zip(starts, ends, strict=True)]
