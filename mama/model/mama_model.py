"""The model: two towers, the heads that the objective's terms need, and learnable logit scales.

Letters: b pairs on this rank, u distinct texts, P patches of an image, Q patches in the local term of the image with
most of them, n those of all images, S sentences of the longest text, d width of a tower, D width of the shared space.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama.data import augment
from mama.data.batches import Batch, Texts
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model.heads import LocalHead, LogitScale, ViewHead, countable
from mama.model.packing import padded
from mama.model.text_tower import TextTower, build_text
from mama.model.vision_tower import ImageFeatures, VisionTower, build_vision
from mama.settings.schema import Config, HeadsConfig, LossConfig


class Embeddings(NamedTuple):
    """The inputs of the objective for b pairs: unit vectors of width D. None if only a term of weight 0 needs it.

    A tuple, so that ZeRO-3 finds the tensors in the model's output.
    """

    text_ids: Tensor  # int64 [b], equal texts have equal ids
    partner_text_ids: Tensor
    anchor: Tensor  # [b, D] global image embedding of v
    anchor_text: Tensor  # [b, D] global text embedding of v's report
    scale: Tensor  # logit scale of the global terms, after the clamp
    local_scale: Tensor
    partner: Tensor | None = None  # [b, D] global image embedding of w
    partner_text: Tensor | None = None  # [b, D] global text embedding of w's report
    anchor_view: Tensor | None = None  # [b, D] view-head embedding of v
    partner_view: Tensor | None = None  # [b, D] of w
    patches: Tensor | None = None  # [b, Q, D] of v, zeros at padding
    sentences: Tensor | None = None  # [b, S, D] of v's text
    sentence_mask: Tensor | None = None  # bool [b, S]
    finding_mask: Tensor | None = None  # bool [b, S], those of them that tell a finding
    finding_ids: Tensor | None = None  # int64 [b], equal where all of these are equal; NO_FINDING where there is none
    patch_mask: Tensor | None = None  # bool [b, Q]; None: all patches take part
    kept: Tensor | None = None  # bool [b, P], which patches `patches` are; None: all


class MamaModel(nn.Module):
    """Maps images and texts, and their patches and sentences, into one space.

    `view_head`, `patch_head` and `sentence_head` are None if their term in `loss` has weight 0.
    """

    def __init__(self, vision: VisionTower, text: TextTower, heads: HeadsConfig, loss: LossConfig) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.published_norms, self.row_by_row = heads.norm == "published", heads.norm == "layer"
        self.tissue_patches = bool(loss.local) and loss.local_patches == "tissue"
        self.uses_partner = bool(loss.view or loss.partner_text)
        self.uses_partner_text = bool(loss.partner_text)
        shape = heads.hidden_dim, heads.embed_dim, heads.norm
        self.image_head = nn.Linear(vision.width, heads.embed_dim)
        self.text_head = nn.Linear(text.width, heads.embed_dim)
        self.view_head = (
            ViewHead(vision.width, heads.view_hidden_dim, heads.embed_dim, heads.norm) if loss.view else None
        )
        self.patch_head = LocalHead(vision.width, *shape) if loss.local else None
        self.sentence_head = LocalHead(text.width, *shape) if loss.local else None
        self.scale = LogitScale(loss.initial_scale, loss.max_scale)
        self.local_scale = LogitScale(loss.initial_scale, loss.max_scale)
        self.reads_alone = bool(loss.local) and text.reads_alone  # sentences are for the local term alone
        if not loss.local:  # the global feature is read before the last norm
            vision.norm.requires_grad_(False)
            self.local_scale.requires_grad_(False)

    def forward(self, batch: Batch) -> Embeddings:
        """Augment, encode and project one micro-batch."""
        images, changes = batch.anchors, batch.anchor_changes
        if self.uses_partner:
            images, changes = torch.cat([images, batch.partners]), torch.cat([changes, batch.partner_changes])
        pixels = augment.apply(images, changes, self.image_head.weight.dtype)
        seen = self.vision(pixels, self.tissue_patches)
        features = seen.pooled  # [b or 2b, d]
        text_features, sentence_features = self.text(batch.texts)  # [u, d], [u, S, d]
        texts = _unit(self.text_head(text_features))  # [u, D]
        embedded = _unit(self.image_head(features))  # [b or 2b, D]
        pairs = len(batch.anchors)
        optional: dict[str, Tensor] = {}
        if self.uses_partner_text:
            optional |= {"partner": embedded[pairs:], "partner_text": texts[batch.partner_text_row]}
        if self.view_head is not None:
            views = _unit(self.view_rows(features)).chunk(2)  # [b, D] each
            optional |= {"anchor_view": views[0], "partner_view": views[1]}
        if self.patch_head is not None:
            if self.reads_alone:
                sentence_features = self.text.alone(batch.texts)
            mask = batch.texts.sentence_mask[batch.anchor_text_row]  # [b, S]
            sentences = self.sentence_rows(sentence_features[batch.anchor_text_row], mask)  # [b, S, D]
            optional |= {
                **self._patches(seen, pairs),
                "sentences": _unit(sentences),
                "sentence_mask": mask,
                "finding_mask": batch.finding_mask,
                "finding_ids": batch.finding_ids,
            }
        return Embeddings(
            text_ids=batch.text_ids,
            partner_text_ids=batch.partner_text_ids,
            anchor=embedded[:pairs],
            anchor_text=texts[batch.anchor_text_row],
            scale=self.scale(),
            local_scale=self.local_scale(),
            **optional,
        )

    def view_rows(self, features: Tensor) -> Tensor:
        """View head: [2b, d], anchors then partners, -> [2b, D]. Published batch norms see one view at a time."""
        assert self.view_head is not None
        if self.published_norms:
            return torch.cat([self.view_head(view) for view in features.chunk(2)])
        return self.view_head(features)

    def patch_rows(self, patches: Tensor) -> Tensor:
        """Patch head: [n, d] -> [n, D]. Batch norms see the patches of all images."""
        assert self.patch_head is not None
        rows: Tensor = self.patch_head(patches)
        return rows

    def _patches(self, seen: ImageFeatures, images: int) -> dict[str, Tensor]:
        """The patches of the first `images`, as `Embeddings` has them."""
        counts = seen.counts[:images]
        rows = _unit(self.patch_rows(seen.patches[: sum(counts)]))
        if seen.kept is None:
            return {"patches": rows.unflatten(0, (images, -1))}
        kept, most = seen.kept[:images], max(counts)
        mask = torch.arange(most, device=kept.device) < kept.sum(1, keepdim=True)
        return {"patches": padded(rows, counts), "patch_mask": mask, "kept": kept}

    def sentence_rows(self, sentences: Tensor, mask: Tensor) -> Tensor:
        """Sentence head: [b, S, d] with bool `mask` [b, S] -> [b, S, D], zeros at padding.

        Published batch norms see the sentences of one text at a time.
        """
        assert self.sentence_head is not None
        if self.row_by_row and not countable(mask):  # padding changes no other row
            projected: Tensor = self.sentence_head(sentences.flatten(0, 1)).unflatten(0, mask.shape)
            return projected.masked_fill(~mask[..., None], 0)
        if self.published_norms:
            projected = torch.cat([self.sentence_head(text[own]) for text, own in zip(sentences, mask, strict=True)])
        else:
            projected = self.sentence_head(sentences[mask])
        rows = projected.new_zeros(*mask.shape, projected.shape[-1])
        rows[mask] = projected
        return rows

    def embed_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 1, H, W] in [-1, 1] -> unit embeddings [b, D], and tower features [b, d] for probes."""
        features = self.vision(images).pooled
        return _unit(self.image_head(features)), features

    def embed_images_and_patches(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `embed_images`, and the `patch_embeddings` [b, P, D] from the same pass of the image tower."""
        seen = self.vision(images, self.tissue_patches)
        return _unit(self.image_head(seen.pooled)), seen.pooled, self._patch_grid(seen)

    def embed_texts(self, texts: Texts) -> Tensor:
        """`Texts` of u rows -> unit embeddings [u, D]."""
        return _unit(self.text_head(self.text(texts)[0]))

    def patch_embeddings(self, images: Tensor) -> Tensor:
        """Unit embeddings [b, P, D] of patches, for a model trained with the local term; as for `embed_images`.

        NaN at a patch that takes no part, as it holds no tissue (`vision.tokens`, `loss.local_patches`).
        """
        return self._patch_grid(self.vision(images, self.tissue_patches))

    def _patch_grid(self, seen: ImageFeatures) -> Tensor:
        rows = _unit(self.patch_rows(seen.patches))
        if seen.kept is None:
            return rows.unflatten(0, (len(seen.counts), -1))
        return rows.new_full((*seen.kept.shape, rows.shape[1]), torch.nan).masked_scatter(seen.kept[..., None], rows)

    def sentence_embeddings(self, texts: Texts) -> Tensor:
        """Unit embeddings [u, S, D] of sentences, zeros at padding, for a model trained with the local term."""
        features = self.text.alone(texts) if self.reads_alone else self.text(texts)[1]
        return _unit(self.sentence_rows(features, texts.sentence_mask))


def build(
    config: Config, tokenizer: Tokenizer, attention: str, text_attention: str | None = None, empty: bool = False
) -> MamaModel:
    """The untrained model of a configuration, in training mode; random weights depend on `config.seed` alone.

    Both towers have the kernel `attention` (`mama.model.attention.choose_both`), or the text tower `text_attention`.
    With `empty` it is on the meta device: names and shapes without weights, which are not read either. Raises
    `ConfigError` if a tower cannot be built, or cannot take `data.image_size` or `data.max_tokens`.
    """
    torch.manual_seed(config.seed)
    with quiet(), torch.device("meta") if empty else nullcontext():
        vision = build_vision(config.vision, attention, empty)
        text = build_text(config.text, tokenizer, text_attention or attention, empty)
        _check_sizes(config, vision, text)
        # Pretrained models come in evaluation mode, without dropout and without activation checkpointing.
        return MamaModel(vision, text, config.heads, config.loss).train()


def build_tower(config: Config, tokenizer: Tokenizer, attention: str, part: str) -> VisionTower | TextTower:
    """One tower of `build`, "vision" or "text", with the same weights; only one is in memory at a time."""
    torch.manual_seed(config.seed)
    with quiet():
        vision = build_vision(config.vision, attention)
        if part == "vision":
            return vision
        del vision  # the numbers that it drew come before those of the language model
        return build_text(config.text, tokenizer, attention)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that transformers has renamed its checkpointing functions, which peft uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def _check_sizes(config: Config, vision: VisionTower, text: TextTower) -> None:
    """Images must divide into whole patches, and the language model must have a position for every token."""
    patch = int(vision.backbone.config.patch_size)
    if any(side % patch for side in config.data.image_size):
        size = list(config.data.image_size)
        raise ConfigError(f"data.image_size: {size} is not a multiple of the image tower's patches of {patch} pixels")
    positions = int(text.backbone.config.max_position_embeddings)
    if config.data.max_tokens > positions:
        raise ConfigError(
            f"data.max_tokens: {config.data.max_tokens}, but the language model has {positions} positions"
        )


def _unit(vectors: Tensor) -> Tensor:
    """Normalise to unit length in fp32 also under bf16: a logit scale of 100 would amplify bf16 rounding."""
    return F.normalize(vectors.float(), dim=-1)
