"""One attention for both towers, registered with transformers' AttentionInterface.

This module is the only importer of xformers. `choose` picks the kernel once and says which; a
kernel that cannot run is an error, never a silent change.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from mama.config import ConfigError

log = logging.getLogger(__name__)

KERNELS = {"xformers": "mama_xformers", "sdpa": "mama_sdpa"}


def choose(requested: str, device: torch.device) -> str:
    """The name to give transformers as `attn_implementation`, for `auto | xformers | sdpa`.

    `auto` takes xformers on CUDA and PyTorch's scaled_dot_product_attention elsewhere. Raises
    `ConfigError` when xformers is asked for where it cannot run.
    """
    obstacle = _xformers_obstacle(device)
    kernel = requested
    if requested == "auto":
        kernel = "sdpa" if obstacle else "xformers"
    elif requested == "xformers" and obstacle:
        raise ConfigError(f"train.attention: xformers cannot run here ({obstacle}); use auto or sdpa")
    reason = f" ({obstacle})" if requested == "auto" and obstacle else ""
    log.info("attention kernel: %s on %s%s", kernel, device.type, reason)
    return KERNELS[kernel]


def _xformers_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"xformers needs CUDA, the device is {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return None


def _repeat_heads(module: nn.Module, heads: Tensor) -> Tensor:
    """Grouped-query attention: [B, G, L, d] keys or values -> one per query head, [B, H, L, d]."""
    groups = getattr(module, "num_key_value_groups", 1)
    return heads.repeat_interleave(groups, dim=1) if groups > 1 else heads


def _is_causal(module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None) -> bool:
    """A mask already holds the causal pattern; without one the module says whether it is causal."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    return bool(causal) and attention_mask is None


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling + mask) V; query [B, H, L, d] -> [B, L, H, d], as transformers expects."""
    out = F.scaled_dot_product_attention(
        query,
        _repeat_heads(module, key),
        _repeat_heads(module, value),
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=_is_causal(module, attention_mask, is_causal),
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean or additive mask that broadcasts to [B, H, L, K] -> all of it, in the query's type.

    xformers does not broadcast, and its kernels read rows that start at a multiple of 8 numbers.
    """
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    keys = mask.shape[-1]
    aligned = F.pad(mask.to(query.dtype), (0, -keys % 8))[..., :keys]
    return aligned.expand(*query.shape[:3], keys)


def xformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same by xformers' memory_efficient_attention."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias: Any = None
    if _is_causal(module, attention_mask, is_causal):
        bias = LowerTriangularMask()
    elif attention_mask is not None:
        bias = _additive(attention_mask, query)
    heads = [t.transpose(1, 2) for t in (query, _repeat_heads(module, key), _repeat_heads(module, value))]
    return memory_efficient_attention(*heads, attn_bias=bias, p=dropout, scale=scaling), None


def without_mask(name: str) -> str:
    """Of a kernel's name, that for a model which never gets a mask: with it transformers does not look for one.

    It would look whether texts are packed, and a GPU would be waited for.
    """
    return f"{name}{CAUSAL}" if name in KERNELS.values() else name


CAUSAL = "_causal"
for _name, _function in (("mama_xformers", xformers), ("mama_sdpa", sdpa)):
    AttentionInterface.register(_name, _function)
    AttentionInterface.register(_name + CAUSAL, _function)
    # Without a mask function of its own name, transformers would hand a custom attention no mask at all.
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
