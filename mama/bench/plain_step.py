"""The training step with transformers, peft and PyTorch alone: what this framework is compared with.

The method is that of Du, Onofrey, Dvornek, arXiv 2409.18119. `plain` is what a careful engineer writes: fp32 weights
under autocast to bf16, PyTorch's fused attention, one pass of the image tower over both views, local alignment in a
loop over the texts, the negatives of one GPU, PyTorch's AdamW, no ZeRO. `published` is the same model with habits of
the published code (github.com/XYPB/MaMA, files of it in brackets):

- autograd's anomaly detection, which checks for NaN after every backward function (top of train.py and of model.py);
- attention weights requested of the language model, hence "eager" attention (backbones/encoder_pemed.py); the
  transformers 4.35.2 of environment.yml has no other for GPT-2;
- every token copied from the GPU by itself, twice: for its word, which is never used, and to find the padding
  (backbones/encoder_pemed.py, `forward` and `find_last_word_token`);
- the image tower called once for each view, the sentence head once for each text (model.py, `forward`);
- in bf16: weights, gradients and AdamW's moments in bf16, without autocast, which saves time and memory and loses small
  updates (`--precision bf16-true` in scripts/lp_pretrained.sh and fft_pretrained.sh; the default of train.py is fp32,
  and the script of the pre-training itself was not among the files read).

Both are faster than the published code in some ways: one rank without DistributedDataParallel, which the scripts let
search for unused parameters; a batch that is on the GPU already, where the published loader copies float images of
three channels; no accuracies and no logging at every step (model.py, `precision_at_k`, `log_dict`); no deterministic
cuDNN algorithms (train.py), which concern one convolution; today's libraries. And slower in others: PyTorch's attention
in the image tower, where environment.yml has xformers; gradients are clipped if `optim.clip_norm` is set, there never;
fp32 matrices are not multiplied in TF32, as train.py allows. Augmentation is not measured, since the published loader
does it. Every patch is computed, also where `vision.tokens` leaves some out here. Activation checkpointing, which
depends on flags there, is measured on and off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from mama.bench.loss import looped_scores
from mama.data.batches import Batch, Texts
from mama.data.tokenizer import Tokenizer
from mama.settings.schema import Config, TextConfig


class PlainModel(nn.Module):
    """GPT-2 under LoRA, DINOv2 and the paper's heads; `forward` returns the loss of a batch."""

    def __init__(self, config: Config, vocabulary: int, as_published: bool = False) -> None:
        super().__init__()
        self.as_published, heads = as_published, config.heads
        self.vision = _tower(config.vision.config, "sdpa")
        self.norm, self.vision.layernorm = self.vision.layernorm, nn.Identity()  # the global feature is taken before it
        text = _tower(config.text.config | {"vocab_size": vocabulary}, "eager" if as_published else "sdpa")
        self.text = _adapted(text, config.text)
        if config.train.activation_checkpointing is True:
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
        """Return the loss of b pairs, the sum of all four terms."""
        pairs, texts = len(batch.anchors), batch.texts
        images = torch.cat([batch.anchors, batch.partners]).split(pairs if self.as_published else 2 * pairs)
        tokens = [self._tokens(part) for part in images]  # of each view, or of both: [b or 2b, 1 + registers + P, d]
        states = self._states(texts)
        features, first = torch.cat([part.mean(1) for part in tokens]), 1 + self.vision.config.num_register_tokens
        mean = (states * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)
        image, text, view = self.image_head(features), self.text_head(mean), self.view_head(features)
        patches = self.patch_head(self.norm(tokens[0][:pairs, first:]))
        ends = states.gather(1, texts.separators[..., None].expand(-1, -1, states.shape[-1]))  # [b, S, d]
        sentences = torch.cat([self.sentence_head(part) for part in ends.split(1 if self.as_published else pairs)])
        image, text, view, patches, sentences = (
            F.normalize(x.to(self.scale.dtype), dim=-1) for x in (image, text, view, patches, sentences)
        )
        return plain_loss(
            image, text, view, patches, sentences, texts.sentence_mask, *self._scales(), temperature=self.temperature
        )

    def _tokens(self, images: Tensor) -> Tensor:
        pixels = (images.float() / 127.5 - 1).expand(-1, self.vision.config.num_channels, -1, -1)
        return self.vision(pixel_values=pixels).last_hidden_state

    def _states(self, texts: Texts) -> Tensor:
        """The last hidden states [b, L, d] of the language model."""
        found = self.text(
            input_ids=texts.tokens, attention_mask=texts.mask, use_cache=False, output_attentions=self.as_published
        )
        if self.as_published:
            _look_up(texts.tokens)
        return found.last_hidden_state

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
    """Return L_VV + L_VT(v, t) + L_VT(w, t) + L_local (arXiv 2409.18119), without gathering and text positives.

    Unit vectors: `image` and `view` [2b, D] of the anchors and then of their partners, `text` [b, D] of both,
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


def plain_step(
    config: Config, tokenizer: Tokenizer, device: torch.device, as_published: bool = False
) -> Callable[[Batch], Tensor]:
    """Return the training step of a new model with AdamW; number types by `train.precision`, see above."""
    torch.manual_seed(config.seed)
    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
        model = PlainModel(config, len(tokenizer), as_published).train()
    bf16 = config.train.precision == "bf16"
    if bf16 and as_published:
        model.to(torch.bfloat16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)

    def step(batch: Batch) -> Tensor:
        with torch.autograd.set_detect_anomaly(as_published):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and not as_published):
                total = model(batch)
            total.backward()
        if optim.clip_norm:
            nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return step


def _look_up(tokens: Tensor) -> None:
    """Copy each of the tokens [b, L] from the device by itself, twice."""
    for text in tokens:
        for token in text:
            token.item()
        for token in text:
            bool(token == 0)  # the comparison is what takes time


def _tower(shape: dict[str, Any], attention: str) -> Any:
    config = AutoConfig.for_model(**shape)
    tower = AutoModel.from_config(config, attn_implementation=attention, trust_remote_code=False)
    for name, parameter in tower.named_parameters():
        if name.endswith("mask_token"):  # used in masked pre-training only
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
