"""The model: two towers, the heads of METHOD, and learnable logit scales."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama import augment
from mama.config import Config, ConfigError, HeadsConfig, LossConfig
from mama.data import Batch, Texts
from mama.tokens import Tokenizer
from mama.towers import TextTower, VisionTower, build_text, build_vision


@dataclass
class Embeddings:
    """Unit vectors of one rank's micro-batch of b pairs; D is the shared width."""

    anchor: Tensor  # [b, D] global image embedding of v
    partner: Tensor  # [b, D] of w
    anchor_text: Tensor  # [b, D]
    partner_text: Tensor  # [b, D]
    anchor_view: Tensor  # [b, D] view-head embedding of v
    partner_view: Tensor  # [b, D] of w
    patches: Tensor  # [b, P, D] of v
    sentences: Tensor  # [b, S, D] of v's text
    sentence_mask: Tensor  # bool [b, S]
    scale: Tensor  # logit scale of the global terms, after the clamp
    local_scale: Tensor


class LocalHead(nn.Sequential):
    """Patches or sentences to the shared space: Linear, norm, ReLU, Linear, norm.

    The norms are LayerNorm: unlike the published BatchNorm it needs no statistics across ranks.
    """

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out), nn.LayerNorm(out)
        )


class ViewHead(nn.Sequential):
    """The projection that the view term is computed on."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))


class LogitScale(nn.Module):
    """exp(s), clamped in forward: a clamp of the parameter itself would be undone by ZeRO's fp32 copy."""

    def __init__(self, initial: float, largest: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((1,), math.log(initial)))  # DeepSpeed cannot broadcast a 0-d tensor
        self.largest = largest

    def forward(self) -> Tensor:
        return self.log.float().exp().clamp(max=self.largest).squeeze()


class MamaModel(nn.Module):
    """Images and texts to one space, globally and locally."""

    def __init__(self, vision: VisionTower, text: TextTower, heads: HeadsConfig, loss: LossConfig) -> None:
        super().__init__()
        self.vision, self.text = vision, text
        self.image_head = nn.Linear(vision.width, heads.embed_dim)
        self.text_head = nn.Linear(text.width, heads.embed_dim)
        self.view_head = ViewHead(vision.width, heads.view_hidden_dim, heads.embed_dim)
        self.patch_head = LocalHead(vision.width, heads.hidden_dim, heads.embed_dim)
        self.sentence_head = LocalHead(text.width, heads.hidden_dim, heads.embed_dim)
        self.scale = LogitScale(loss.initial_scale, loss.max_scale)
        self.local_scale = LogitScale(loss.initial_scale, loss.max_scale)

    def forward(self, batch: Batch) -> Embeddings:
        """Augment, encode and project one micro-batch."""
        images = augment.apply(
            torch.cat([batch.anchors, batch.partners]), torch.cat([batch.anchor_changes, batch.partner_changes])
        ).to(self.image_head.weight.dtype)
        features, patches = self.vision(images)  # [2b, d], [2b, P, d]
        anchor, partner = _unit(self.image_head(features)).chunk(2)
        anchor_view, partner_view = _unit(self.view_head(features)).chunk(2)
        text_features, sentence_features = self.text(batch.texts)  # [u, d], [u, S, d]
        texts = _unit(self.text_head(text_features))
        sentences = _unit(self.sentence_head(sentence_features))
        return Embeddings(
            anchor=anchor,
            partner=partner,
            anchor_text=texts[batch.anchor_text],
            partner_text=texts[batch.partner_text],
            anchor_view=anchor_view,
            partner_view=partner_view,
            patches=_unit(self.patch_head(patches[: len(anchor)])),
            sentences=sentences[batch.anchor_text],
            sentence_mask=batch.texts.sentence_mask[batch.anchor_text],
            scale=self.scale(),
            local_scale=self.local_scale(),
        )

    def embed_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 1, H, W] in [-1, 1] -> unit embeddings [b, D], and tower features [b, d] for probes."""
        features, _ = self.vision(images)
        return _unit(self.image_head(features)), features

    def embed_texts(self, texts: Texts) -> Tensor:
        """Unit embeddings [u, D]."""
        return _unit(self.text_head(self.text(texts)[0]))

    def alignment(self, images: Tensor, texts: Texts) -> Tensor:
        """Cosine of every sentence with every patch of its image: [b, S, P], row i of both together."""
        patches = _unit(self.patch_head(self.vision(images)[1]))
        sentences = _unit(self.sentence_head(self.text(texts)[1]))
        return torch.einsum("bsd,bpd->bsp", sentences, patches)


def build(config: Config, tokenizer: Tokenizer, attention: str) -> MamaModel:
    """The untrained model of a configuration; random weights are a function of `config.seed`."""
    torch.manual_seed(config.seed)
    vision = build_vision(config.vision, attention)
    text = build_text(config.text, tokenizer, attention)
    _check_sizes(config, vision, text)
    model = MamaModel(vision, text, config.heads, config.loss)
    if config.train.activation_checkpointing:
        for backbone in (vision.backbone, text.backbone):
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _check_sizes(config: Config, vision: VisionTower, text: TextTower) -> None:
    """Images are cut into whole patches, and texts must have positions for all their tokens."""
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
    """Unit vectors in fp32, whatever the model computes in: a logit scale of 100 would show the rounding of bf16."""
    return F.normalize(vectors.float(), dim=-1)
