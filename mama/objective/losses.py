"""The objective of MaMA: L = L_VV(v, w) + L_VT(v, t) + L_VT(w, t) + lambda(step) L_local.

Source: Du, Onofrey, Dvornek, "Multi-View and Multi-Scale Alignment for Contrastive Language-Image
Pre-training in Mammography", arXiv 2409.18119 (IPMI 2025); see docs/METHOD.md, "Objective". Letters:

    b  pairs on this rank        B  pairs on all ranks      D  width of the shared space
    S  sentences of a text       P  patches of an image

Every loss takes this rank's embeddings and a function `share` that collects those of other ranks. With `gather`
it returns the loss of the global batch, the same value on every rank; averaging the gradients over ranks, as
data parallelism does, then gives the gradient that one rank would compute on the whole batch. With
`local_only` (the published code, except for its view term) B = b and each rank has its own loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mama.data.batches import NO_FINDING
from mama.model.mama_model import Embeddings
from mama.objective.local_alignment import alignment_scores
from mama.runtime.collectives import gather, local_only, max_over_ranks
from mama.settings.schema import LossConfig

Share = Callable[[Tensor], Tensor]


def info_nce(scores: Tensor, targets: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean cross-entropy over rows and over columns, averaged.

    `scores` [B, B] are logits. `targets` [B, B] weigh the positives of each row and column and are normalised here;
    the identity gives the CLIP loss (Radford et al. 2021, figure 3). A row or column without positives adds 0.
    """
    rows = F.cross_entropy(scores, targets / targets.sum(1, keepdim=True).clamp(min=1))
    columns = F.cross_entropy(scores.t(), targets.t() / targets.t().sum(1, keepdim=True).clamp(min=1))
    return (rows + columns) / 2


def info_nce_of_some(scores: Tensor, targets: Tensor) -> Tensor:
    """`info_nce` of the pairs that are positives at least of themselves; the others are in no row, column or mean.

    0, with gradients of 0, if there are none. How many there are is known to the device alone, which is not waited for.
    """
    taken = targets.diagonal() > 0  # [B]
    scores = scores.masked_fill(~(taken[:, None] & taken), torch.finfo(scores.dtype).min)  # not -inf: 0 * inf is NaN
    return info_nce(scores, targets) * (len(taken) / taken.sum().clamp(min=1).to(scores.dtype))


def positives(text_ids: Tensor, same_text: bool, share: Share = gather) -> Tensor:
    """The mask of positive pairs, float [B, B]: the diagonal, and with `same_text` all pairs with equal `text_ids` [b].

    Report texts made from facts repeat often; without `same_text` equal texts are each other's false negatives.
    """
    ids = share(text_ids)
    if same_text:
        return (ids[:, None] == ids[None, :]).float()
    return torch.eye(len(ids), device=ids.device)


def finding_positives(finding_ids: Tensor, share: Share = gather) -> Tensor:
    """`positives` of pairs by their `finding_ids` [b]: 1 where they are equal, 0 wherever a text tells no finding."""
    ids = share(finding_ids)
    return ((ids[:, None] == ids[None, :]) & (ids != NO_FINDING)).float()


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor, targets: Tensor, share: Share = gather) -> Tensor:
    """L_VT: the CLIP loss between unit embeddings `images` and `texts` [b, D]; `targets` [B, B] are the positives."""
    scores = scale * share(images) @ share(texts).t()  # [B, B]
    return info_nce(scores, targets)


def view_loss(anchors: Tensor, partners: Tensor, temperature: float, share: Share = gather) -> Tensor:
    """L_VV: NT-Xent (Chen et al. 2020, equation 1) between unit embeddings [b, D] of two views.

    The positive of each of the 2 B views is its partner; the other 2 B - 2 views are its negatives.
    """
    anchors, partners = share(anchors), share(partners)  # [B, D]
    views = torch.cat([anchors, partners])
    scores = views @ views.t() / temperature  # [2B, 2B]
    scores = scores.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf"))
    count = len(anchors)
    partner = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(scores, partner)


def local_loss(
    sentences: Tensor,
    mask: Tensor,
    patches: Tensor,
    scale: Tensor,
    targets: Tensor,
    config: LossConfig,
    share: Share = gather,
    patch_mask: Tensor | None = None,
) -> Tensor:
    """L_local = (CE(scale V) + CE(scale T)) / 2, or the one that `config.local_scores` names.

    Unit vectors `sentences` [b, S, D] with bool `mask` [b, S], and `patches` [b, P, D] with bool `patch_mask` [b, P] if
    there is padding; `targets` [B, B]. With `local_sentences=findings` pairs that are no positives, not even of
    themselves, take no part, and their `mask` may be all false. Only the few sentence embeddings cross ranks: each rank
    scores all texts against its own images, and the columns of V and T are gathered.
    """
    missing = max_over_ranks(mask.shape[1], mask.device) - mask.shape[1]  # pad S to the longest text of all ranks
    sentences, mask = share(F.pad(sentences, (0, 0, 0, missing))), share(F.pad(mask, (0, missing)))
    cross_entropy = info_nce
    if config.local_sentences == "findings":
        cross_entropy = info_nce_of_some
        stand_in = torch.arange(mask.shape[1], device=mask.device) == 0  # a text without a sentence has no scores
        mask = torch.where(targets.diagonal()[:, None] > 0, mask, stand_in)
    temperature = config.local_temperature if config.local_pooling == "softmax" else None
    visual, textual = alignment_scores(
        sentences, mask, patches, config.local_chunk, patch_mask, temperature
    )  # [B, b], rows are texts
    sides = {"both": (visual, textual), "visual": (visual,), "textual": (textual,)}[config.local_scores]
    losses = [cross_entropy(scale * share(side.t()).t(), targets) for side in sides]
    return torch.stack(losses).mean()


@torch.no_grad()
def retrieval_accuracy(images: Tensor, texts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 accuracy of retrieval in the global batch: image to text, text to image.

    Unit embeddings `images` and `texts` [b, D]; `targets` [B, B] marks the positives.
    """
    scores = gather(images) @ gather(texts).t()
    rows = torch.arange(len(scores), device=scores.device)
    return targets[rows, scores.argmax(1)].mean(), targets[scores.argmax(0), rows].mean()


def first_steps(config: LossConfig) -> dict[str, int]:
    """The step from which each term counts."""
    return {
        "view": config.view_start,
        "anchor_text": 0,
        "partner_text": config.partner_text_start,
        "local": config.local_start,
    }


def weights_at(config: LossConfig, step: int) -> dict[str, float]:
    """The weight of each term at `step`, 0 before its first step: the paper's lambda(step), for every term."""
    return {term: getattr(config, term) if step >= first else 0.0 for term, first in first_steps(config).items()}


def objective(e: Embeddings, config: LossConfig, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms at `step`, and each unweighted term by name.

    A term is computed before its first step too, with weight 0, so that its curve is logged and every parameter has
    a gradient.
    """
    share = gather if config.negatives == "global" else local_only
    same_text = config.positives == "text"
    targets = positives(e.text_ids, same_text, share)
    terms: dict[str, Tensor] = {}
    if e.anchor_view is not None and e.partner_view is not None:
        share_views = local_only if config.negatives == "local" else gather
        terms["view"] = view_loss(e.anchor_view, e.partner_view, config.view_temperature, share_views)
    if config.anchor_text:
        terms["anchor_text"] = clip_loss(e.anchor, e.anchor_text, e.scale, targets, share)
    if e.partner is not None and e.partner_text is not None:
        partner_targets = positives(e.partner_text_ids, same_text, share)
        terms["partner_text"] = clip_loss(e.partner, e.partner_text, e.scale, partner_targets, share)
    if e.patches is not None and e.sentences is not None:
        mask, own = e.sentence_mask, targets
        if config.local_sentences == "findings":
            assert e.finding_ids is not None
            mask, own = e.finding_mask, finding_positives(e.finding_ids, share)
        assert mask is not None
        terms["local"] = local_loss(e.sentences, mask, e.patches, e.local_scale, own, config, share, e.patch_mask)
    weights = weights_at(config, step)
    total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return total, terms
