"""A model small enough to train in a moment: its settings, its tokeniser, and batches for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mama.data import augment
from mama.data.batches import Batch, Collate
from mama.data.pairs import Pair
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import MamaModel, build
from mama.settings.schema import (
    Config,
    DataConfig,
    HeadsConfig,
    LossConfig,
    OptimConfig,
    Sentences,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from tests.support.word_tokenizer import WORDS, tokenizer

PAIRS = 8


def tiny(ranks: int, **train: Any) -> Config:
    """The settings of the model and of four steps of `PAIRS` pairs on `ranks` ranks; `train` overrides their own."""
    vision = {
        "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": 32, "patch_size": 8,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2,
    }  # fmt: skip
    text = {
        "model_type": "gpt2", "vocab_size": 64, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Config(
        seed=1,
        data=DataConfig(image_size=(32, 16), max_tokens=64, workers=0),
        vision=VisionConfig(model=None, config=vision),
        text=TextConfig(model=None, config=text, lora_rank=2, lora_dropout=0.0, packing=True),
        heads=HeadsConfig(embed_dim=16, hidden_dim=16, view_hidden_dim=16),
        loss=LossConfig(local_start=0, positives="text"),
        optim=OptimConfig(clip_norm=0.0, warmup_steps=1),
        train=replace(
            TrainConfig(
                steps=4, global_batch=PAIRS, micro_batch=PAIRS // ranks, ranks=ranks, precision="fp32",
                activation_checkpointing=True,
            ),
            **train,
        ),
    )  # fmt: skip


def on_tissue(config: Config) -> Config:
    """The same with the image tower on tissue alone, in smaller patches, of which images have different numbers."""
    vision = replace(config.vision, tokens="tissue", config=config.vision.config | {"patch_size": 4})
    return replace(config, vision=vision)


def on_parts(config: Config, sentences: Sentences = "alone") -> Config:
    """The same with every part of the local term that is not the published one; of two ranks one has no finding."""
    parts: dict[str, Any] = {"local_sentences": "findings", "local_patches": "tissue", "local_pooling": "softmax"}
    vision = replace(on_tissue(config).vision, tokens="all", local_block=1)
    text = replace(config.text, sentences=sentences)
    return replace(config, vision=vision, text=text, loss=replace(config.loss, **parts))


def breast(size: tuple[int, int], width: float) -> np.ndarray:
    """Whether a pixel [H, W] is of a breast that is `width` of the canvas wide in its middle."""
    y = np.linspace(-1, 1, size[0])[:, None]
    return np.linspace(0, 1, size[1]) < width * (1 - y**2)


def batch_of(config: Config, rows: range) -> Batch:
    """Pairs whose texts have 1 to 4 sentences, so that ranks differ in their longest text; noise all over the images.

    With `vision.tokens=tissue` or `loss.local_patches=tissue` breasts are of different width, so that ranks differ in
    their patches too. With `loss.local_sentences=findings` the second half of the pairs has findings.
    """
    pairs = []
    for row in rows:
        rng = np.random.default_rng(row)
        size = config.data.image_size
        # Rows 0 and 5 share their text, on different ranks.
        text_rng = np.random.default_rng(0 if row == 5 else row)
        count = 4 if row == 7 else int(text_rng.integers(1, 3))
        text = [" ".join(text_rng.choice(WORDS[1:], 3)) for _ in range(count)]
        if config.loss.local_sentences == "findings" and row >= PAIRS // 2:  # equal of the rows 4 and 7; of ranks one
            text[-1:] = [f"Findings: {WORDS[1 + row % 3]}", text[-1]]
        v, w = (rng.integers(0, 256, size, dtype=np.uint8) for _ in range(2))
        if "tissue" in (config.vision.tokens, config.loss.local_patches):
            v, w = v * breast(size, 0.2 + row / 10), w * breast(size, 0.8)
        change_v, change_w = (augment.draw(config.data.augment, pixels, rng) for pixels in (v, w))
        pairs.append(Pair(str(row), v, w, change_v, change_w, text, text if row % 2 else ["beta"]))
    return Collate(tokenizer(), config.data.max_tokens)(pairs)


def model_of(config: Config) -> MamaModel:
    """The model of `config`, with every LoRA matrix away from 0."""
    model = build(config, tokenizer(), attention.choose("sdpa", torch.device("cpu")))
    prepare_blocks(model, config.train, torch.device("cpu"))
    return with_lora(model)


def with_lora(model: MamaModel) -> MamaModel:
    """The same model, with every LoRA matrix away from 0."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return model
