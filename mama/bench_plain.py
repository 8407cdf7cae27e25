"""The training step of `mama bench step` with transformers, peft and PyTorch alone: what a framework has to beat.

As the published code does it: towers of transformers with the attention that they choose, LoRA by peft, weights in
fp32 under autocast to bf16, local alignment in a loop over the texts, the negatives of one GPU, PyTorch's AdamW.
Source: Du, Onofrey, Dvornek, arXiv 2409.18119. It is one rank without ZeRO, and is spared the augmentation, which
the published code leaves to the loader.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from mama.bench_loss import looped_scores
from mama.bench_step import Step
from mama.config import Config, TextConfig
from mama.data import Batch
from mama.tokens import Tokenizer


class PlainModel(nn.Module):
    """Two towers and the heads of the paper, for GPT-2 under LoRA and DINOv2; gives the loss of a batch."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        heads = config.heads
        self.vision = _tower(config.vision.config)
        self.norm, self.vision.layernorm = self.vision.layernorm, nn.Identity()  # the global feature is read before it
        self.text = _adapted(_tower(config.text.config | {"vocab_size": vocabulary}), config.text)
        if config.train.activation_checkpointing:
            for tower in (self.vision, self.text):
                tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wide, long = self.vision.config.hidden_size, self.text.config.hidden_size
        self.image_head, self.text_head = nn.Linear(wide, heads.embed_dim), nn.Linear(long, heads.embed_dim)
        self.view_head = _mlp(wide, heads.view_hidden_dim, heads.embed_dim)
        self.patch_head = nn.Sequential(_mlp(wide, heads.hidden_dim, heads.embed_dim), nn.LayerNorm(heads.embed_dim))
        self.sentence_head = nn.Sequential(_mlp(long, heads.hidden_dim, heads.embed_dim), nn.LayerNorm(heads.embed_dim))
        self.scale = nn.Parameter(torch.tensor(config.loss.initial_scale).log())
        self.local_scale = nn.Parameter(torch.tensor(config.loss.initial_scale).log())
        self.temperature = config.loss.view_temperature

    def forward(self, batch: Batch) -> Tensor:
        """The loss of b pairs, all four terms."""
        images, pairs, texts = torch.cat([batch.anchors, batch.partners]), len(batch.anchors), batch.texts
        pixels = (images.float() / 127.5 - 1).expand(-1, self.vision.config.num_channels, -1, -1)
        tokens = self.vision(pixel_values=pixels).last_hidden_state  # [2b, 1 + registers + P, d]
        states = self.text(input_ids=texts.tokens, attention_mask=texts.mask, use_cache=False).last_hidden_state
        features, first = tokens.mean(1), 1 + self.vision.config.num_register_tokens
        mean = (states * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)
        image, text, view = self.image_head(features), self.text_head(mean), self.view_head(features)
        patches = self.patch_head(self.norm(tokens[:pairs, first:]))
        sentences = self.sentence_head(states.gather(1, texts.separators[..., None].expand(-1, -1, states.shape[-1])))
        image, text, view, patches, sentences = (
            F.normalize(x.float(), dim=-1) for x in (image, text, view, patches, sentences)
        )
        return plain_loss(
            image, text, view, patches, sentences, texts.sentence_mask, *self._scales(), temperature=self.temperature
        )

    def _scales(self) -> tuple[Tensor, Tensor]:
        return self.scale.exp().clamp(max=100), self.local_scale.exp().clamp(max=100)


def plain_loss(
    image: Tensor,
    text: Tensor,
    view: Tensor,
    patches: Tensor,
    sentences: Tensor,
    mask: Tensor,
    scale: Tensor,
    local_scale: Tensor,
    temperature: float,
) -> Tensor:
    """L_VV + L_VT(v, t) + L_VT(w, t) + L_local of unit vectors, without gathering and without text positives.

    `image` and `view` [2b, D] are of the anchors, then of their partners; `text` [b, D] is of both;
    `patches` [b, P, D] of the anchors, `sentences` [b, S, D] with their `mask` [b, S].
    """
    pairs = len(text)
    own = torch.arange(pairs, device=text.device)
    both_ways = [scale * text @ part.t() for part in image.split(pairs)]
    similar = (view @ view.t() / temperature).fill_diagonal_(float("-inf"))
    partner = torch.cat([own + pairs, own])
    visual, textual = looped_scores(sentences, mask, patches)
    symmetric = sum(_cross_entropies(scores, own) for scores in both_ways)
    local = (_cross_entropies(local_scale * visual, own) + _cross_entropies(local_scale * textual, own)) / 2
    return F.cross_entropy(similar, partner) + symmetric + local


def plain_step(config: Config, tokenizer: Tokenizer, device: torch.device) -> Step:
    """The model with AdamW, and one update; `train.precision` decides whether it runs under autocast."""
    torch.manual_seed(config.seed)
    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        model = PlainModel(config, len(tokenizer)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    bf16 = config.train.precision == "bf16"

    def step(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total = model(batch)
        total.backward()
        if optim.clip_norm:
            nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return step


def _tower(shape: dict[str, Any]) -> Any:
    tower = AutoModel.from_config(AutoConfig.for_model(**shape), trust_remote_code=False)
    for name, parameter in tower.named_parameters():
        if name.endswith("mask_token"):  # of another pre-training
            parameter.requires_grad_(False)
    return tower


def _adapted(tower: nn.Module, text: TextConfig) -> Any:
    lora = LoraConfig(
        r=text.lora_rank,
        lora_alpha=text.lora_alpha,
        lora_dropout=text.lora_dropout,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    return get_peft_model(tower, lora)


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))


def _cross_entropies(scores: Tensor, own: Tensor) -> Tensor:
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2
