"""Floating point operations of training, from the shapes of the model, and what a GPU can do at most.

A multiply-add is two operations. Counted are the products with weight matrices and of attention: once
forward, once for the gradient of the activations where something before them is trained, and once for the
gradient of the weights where they are trained, which a frozen base under LoRA is not. As in the definition
of MFU (Chowdhery et al. 2022, "PaLM", appendix B) causal attention counts in full, and nothing counts that
a kernel or activation checkpointing computes a second time, unless it is asked for. Left out are norms,
activations, embedding tables, augmentation, the objective and the optimizer.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mama.model.mama_model import MamaModel

# Dense peak of the tensor cores in bf16, operations per second: NVIDIA's data sheets of A100 (2021), H100 (2023;
# half of the figure "with sparsity"), H200 (2024; likewise) and L40S (2023). V100 (2018) knows only fp16.
PEAKS = {
    r"\bA100\b": 312e12,
    r"\bH100 \d+GB HBM3\b": 989e12,  # as the SXM module calls itself
    r"\bH100 PCIe\b": 756e12,
    r"\bH100 NVL\b": 835e12,
    r"\bH200$": 989e12,
    r"\bL40S\b": 362e12,
    r"\bV100-SXM": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of `device` at most, dense, in bf16; None where `PEAKS` does not know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of the GPU that it names
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


def pair_flops(
    model: MamaModel,
    image_size: tuple[int, int],
    tokens: float,
    *,
    texts: float = 1.0,
    sentences: float = 10.0,
    recompute: bool = False,
) -> float:
    """Operations of one training pair, forward and backward.

    The images are of `image_size` (H, W), the partner only where a term needs it; `texts` different texts of
    `tokens` tokens are encoded for a pair, and the anchor's has `sentences`. `recompute` also counts the
    second forward pass through every block that activation checkpointing takes; PyTorch spares itself the
    last products of a block, so that a little less is done.
    """
    vision = model.vision.backbone
    patch = int(vision.config.patch_size)
    patches = (image_size[0] // patch) * (image_size[1] // patch)
    image = _tower(vision, model.vision.prefix + patches, recompute) + _patch_embedding(vision, patches)
    text = _tower(model.text.backbone, tokens, recompute)
    return (
        (2 if model.uses_partner else 1) * (image + _matrices(model.image_head, 1) + _matrices(model.view_head, 1))
        + texts * (text + _matrices(model.text_head, 1))
        + _matrices(model.patch_head, patches)  # of the anchor alone, as the sentences
        + _matrices(model.sentence_head, sentences)
    )


def _tower(backbone: Any, length: float, recompute: bool) -> float:
    """A transformer on a sequence of `length`: its matrices, and Q K^T and the weighted sum of V in each block."""
    config = backbone.config
    width = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * (
        config.num_attention_heads
    )
    attention = config.num_hidden_layers * 2 * 2 * length**2 * width
    trained = any(parameter.requires_grad for parameter in backbone.parameters())
    passes = 1 + 2 * trained + (recompute and trained)
    return passes * attention + _matrices(backbone, length, trained, recompute and trained)


def _matrices(module: nn.Module | None, positions: float, trained: bool = True, recompute: bool = False) -> float:
    """Every weight matrix in `module` times `positions` vectors; `trained`: does anything before them learn?"""
    total = 0.0
    for name, part in module.named_modules() if module else ():
        if isinstance(part, nn.Linear | Conv1D) and "pooler" not in name:  # no tower reads its pooler
            rows, columns = (part.nx, part.nf) if isinstance(part, Conv1D) else (part.in_features, part.out_features)
            total += (1 + trained + part.weight.requires_grad + recompute) * 2 * positions * rows * columns
    return total


def _patch_embedding(backbone: nn.Module, patches: int) -> float:
    """The convolution that makes patches into tokens; pixels need no gradient."""
    total = 0.0
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d):
            size = part.in_channels * part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            total += (1 + part.weight.requires_grad) * 2 * patches * size
    return total
