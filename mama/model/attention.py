"""One attention for both towers, registered with transformers' AttentionInterface.

This module is the only importer of xformers. `choose` picks the kernel once and says which; a
kernel that cannot run is an error before the first step, never a silent change.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
from importlib.machinery import PathFinder
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from mama.settings.schema import ConfigError

log = logging.getLogger(__name__)

KERNELS = {"xformers": "mama_xformers", "sdpa": "mama_sdpa"}
HOPPER = (9, 0)  # compute capability from which PyTorch has cuDNN's attention, faster than flash-attention 2
# xformers' wheel is linked with it, a torch for CUDA 13 does not bring it, a package on PyPI does.
CUDA_12, CUDA_12_PACKAGE = "libcudart.so.12", "nvidia-cuda-runtime-cu12"


def choose(requested: str, device: torch.device) -> str:
    """The name to give transformers as `attn_implementation`, for `auto | xformers | sdpa`.

    `auto` takes xformers on CUDA devices older than Hopper where its operators run, and PyTorch's
    scaled_dot_product_attention elsewhere. Raises `ConfigError` when xformers is asked for where it cannot run.
    """
    kernel, reason = requested, None
    if requested == "auto":
        reason = _newer_than_xformers(device) or _xformers_obstacle(device)
        kernel = "sdpa" if reason else "xformers"
    elif requested == "xformers" and (obstacle := _xformers_obstacle(device)):
        raise ConfigError(f"train.attention: xformers cannot run here ({obstacle}); use auto or sdpa")
    log.info("attention kernel: %s on %s%s", kernel, device.type, f" ({reason})" if reason else "")
    return KERNELS[kernel]


def _newer_than_xformers(device: torch.device) -> str | None:
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) < HOPPER:
        return None
    return "compute capability {}.{}: from 9.0 on PyTorch has cuDNN's kernels".format(*capability)


def _xformers_obstacle(device: torch.device) -> str | None:
    """Why xformers cannot run on this device, in one line; None where it can: it has been tried."""
    if device.type != "cuda":
        return f"xformers needs CUDA, the device is {device.type}"
    if unloaded := load_xformers():
        return unloaded
    try:
        _try_xformers(device)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return _in_one_line(error)
    return None


def load_xformers() -> str | None:
    """Load xformers' extension, with the CUDA runtime that it is linked with, as must be before xformers is imported.

    Returns why it does not load, in one line with what to do; None where it does.
    """
    package = importlib.util.find_spec("xformers")
    if package is None:
        return "xformers is not installed: pip install xformers"
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    try:
        if extension and extension.origin:
            _load(extension.origin)
    except OSError as error:
        other = f"install the version of xformers that was built for PyTorch {torch.__version__}"
        fix = f"pip install {CUDA_12_PACKAGE}" if CUDA_12 in str(error) else other
        return f"xformers' extension does not load, {_in_one_line(error)}: {fix}"
    return None


def _load(extension: str) -> None:
    try:
        ctypes.CDLL(extension)
    except OSError as error:
        runtime = _cuda_12_runtime()
        if CUDA_12 not in str(error) or runtime is None:
            raise
        ctypes.CDLL(runtime)
        ctypes.CDLL(extension)


def _cuda_12_runtime() -> str | None:
    """The file of CUDA 12's runtime in the package that brings it."""
    try:
        files = importlib.metadata.files(CUDA_12_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == CUDA_12), None)


@torch.inference_mode(False)  # with gradients, wherever it is called
def _try_xformers(device: torch.device) -> None:
    """Forward and backward in every precision and with every kind of mask of a run; raises what xformers raises."""
    length, heads = 13, 2
    padding = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for causal, mask in ((False, None), (True, None), (False, padding)):
            # Zeros: a random number drawn here would change those that the run draws.
            tensor = torch.zeros(1, heads, length, 64, dtype=dtype, device=device, requires_grad=True)
            out, _ = xformers(nn.Identity(), tensor, tensor, tensor, mask, is_causal=causal)
            torch.autograd.grad(out.sum(), tensor)[0].cpu()  # waits until the kernels have run


def _in_one_line(error: Exception) -> str:
    """A message's first line; of xformers' list of its operators what the last, the most general one, lacks."""
    _, found, reasons = str(error).rpartition("is not supported because:")
    lines = [line.strip() for line in reasons.splitlines() if line.strip()]
    return "; ".join(lines if found else lines[:1]) or type(error).__name__


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


CAUSAL = "_causal"


def without_mask(name: str) -> str:
    """Of a kernel's name, that for a model which never gets a mask: with it transformers does not look for one.

    It would look whether texts are packed, and a GPU would be waited for.
    """
    return f"{name}{CAUSAL}" if name in KERNELS.values() else name


for _name, _function in (("mama_xformers", xformers), ("mama_sdpa", sdpa)):
    AttentionInterface.register(_name, _function)
    AttentionInterface.register(_name + CAUSAL, _function)
    # Without a mask function of its own name, transformers would hand a custom attention no mask at all.
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
