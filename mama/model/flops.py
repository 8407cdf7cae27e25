"""Floating point operations of training, from the shapes of the model, and the peak rate of a GPU.

A multiply-add is two operations. Matrix products with weights and of attention count once for the forward pass, once
for the gradient of activations if anything before them is trained, and once for the gradient of trained weights (not
for a frozen base under LoRA). As in the definition of MFU (Chowdhery et al. 2022, "PaLM", appendix B) causal attention
counts in full, and recomputation by kernels or activation checkpointing does not count unless requested. Left out:
norms, activations, embedding tables, augmentation, objective, optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mama.model.mama_model import MamaModel

# Dense peak of the tensor cores in bf16, operations per second: NVIDIA's data sheets of A100 (2021), H100 (2023;
# half of the figure "with sparsity"), H200 (2024; likewise) and L40S (2023). V100 (2018): fp16, it has no bf16.
PEAKS = {
    r"\bA100\b": 312e12,
    r"\bH100 \d+GB HBM3\b": 989e12,  # the name that the SXM module reports
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH200$": 989e12,
    r"\bL40S\b": 362e12,
    r"\bV100-SXM": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak operations per second of `device`, dense, in bf16; None if it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # only a slice of the named GPU
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


def pair_flops(
    model: MamaModel,
    image_size: tuple[int, int],
    texts: Sequence[float],
    *,
    images: Sequence[float] = (),
    each: float = 1.0,
    sentences: float = 10.0,
    alone: Sequence[float] = (),
    recompute: bool = False,
) -> float:
    """Operations of one training pair, forward and backward, on average.

    `texts` are the tokens of each text that is encoded, `each` the different texts of a pair; the anchor's has
    `sentences` sentences. `alone` are the tokens of each sentence that is encoded by itself, for as many texts.
    `images` are the tokens of each image, with class and registers, if only patches with tissue are encoded; else all
    of `image_size` (H, W) are. The patch head counts as many, also where `loss.local_patches` gives it fewer. The
    partner image counts only if a term needs it. `recompute` also counts the second forward pass of
    activation checkpointing; it overestimates slightly, as PyTorch skips the last products of a block.
    """
    vision, whole = model.vision.backbone, model.vision.patches_of(image_size)
    lengths = images or [model.vision.prefix + whole]
    image = _tower(vision, lengths, recompute) + _patch_embedding(vision, whole)
    text = _tower(model.text.backbone, texts, recompute)
    if alone:
        text += len(alone) / len(texts) * _tower(model.text.backbone, alone, recompute)
    return (
        (2 if model.uses_partner else 1) * (image + _matrices(model.image_head, 1) + _matrices(model.view_head, 1))
        + each * (text + _matrices(model.text_head, 1))
        # of the anchor alone, like the sentences
        + _matrices(model.patch_head, sum(lengths) / len(lengths) - model.vision.prefix)
        + _matrices(model.sentence_head, sentences)
    )


def _tower(backbone: Any, lengths: Sequence[float], recompute: bool) -> float:
    """A transformer on a sequence, the mean over those of `lengths`: weights, and Q K^T and the weighted sum of V."""
    config = backbone.config
    width = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * (
        config.num_attention_heads
    )
    mean, squares = (sum(length**power for length in lengths) / len(lengths) for power in (1, 2))
    attention = config.num_hidden_layers * 2 * 2 * squares * width
    trained = any(parameter.requires_grad for parameter in backbone.parameters())
    passes = 1 + 2 * trained + (recompute and trained)
    return passes * attention + _matrices(backbone, mean, trained, recompute and trained)


def _matrices(module: nn.Module | None, positions: float, trained: bool = True, recompute: bool = False) -> float:
    """Every weight matrix in `module` times `positions` vectors; `trained`: is anything before them trained?"""
    total = 0.0
    for name, part in module.named_modules() if module else ():
        if isinstance(part, nn.Linear | Conv1D) and "pooler" not in name:  # no tower uses its pooler
            rows, columns = (part.nx, part.nf) if isinstance(part, Conv1D) else (part.in_features, part.out_features)
            total += (1 + trained + part.weight.requires_grad + recompute) * 2 * positions * rows * columns
    return total


def _patch_embedding(backbone: nn.Module, patches: int) -> float:
    """The convolution that embeds patches; pixels need no gradient."""
    total = 0.0
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d):
            size = part.in_channels * part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            total += (1 + part.weight.requires_grad) * 2 * patches * size
    return total
