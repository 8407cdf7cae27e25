"""One attention for both towers, registered with transformers' AttentionInterface.

The only importer of xformers. `choose` picks the kernel once and logs it; requesting one that cannot run is an error
before the first step, never a silent fallback.

Letters: B sequences, H heads, G groups of heads that share keys and values, L queries, K keys, d width of a head.
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

from mama.errors import ConfigError
from mama.model.packing import Packing
from mama.settings.schema import Config

log = logging.getLogger(__name__)

KERNELS = {"xformers": "mama_xformers", "sdpa": "mama_sdpa"}
HOPPER = (9, 0)  # compute capability from which PyTorch has cuDNN's attention, faster than flash-attention 2
# xformers' wheel is linked against it; a torch for CUDA 13 does not ship it, this package on PyPI does.
CUDA_12, CUDA_12_PACKAGE = "libcudart.so.12", "nvidia-cuda-runtime-cu12"


def choose(requested: str, device: torch.device, packed: bool = False) -> str:
    """The `attn_implementation` for transformers, for `requested` of `auto | xformers | sdpa`; logs the choice.

    `auto` is xformers on CUDA devices older than Hopper, and for `packed` sequences on all of them, if its operators
    run, else PyTorch's scaled_dot_product_attention. Raises `ConfigError` if xformers is requested and cannot run.
    """
    kernel, reason = requested, None
    if requested == "auto":
        reason = None if packed else _newer_than_xformers(device)
        reason = reason or _xformers_obstacle(device, packed)
        kernel = "sdpa" if reason else "xformers"
    elif requested == "xformers" and (obstacle := _xformers_obstacle(device, packed)):
        raise ConfigError(f"train.attention: xformers cannot run here ({obstacle}); use auto or sdpa")
    of = " of packed sequences" if packed else ""
    log.info("attention kernel%s: %s on %s%s", of, kernel, device.type, f" ({reason})" if reason else "")
    return KERNELS[kernel]


def choose_both(config: Config, device: torch.device) -> tuple[str, str]:
    """The `attn_implementation` of the image and of the text tower; raises `ConfigError` as `choose` does."""
    packed = config.vision.tokens == "tissue", config.text.packing or config.text.sentences == "alone"
    image = choose(config.train.attention, device, packed[0])
    return image, image if packed[0] == packed[1] else choose(config.train.attention, device, packed[1])


def _newer_than_xformers(device: torch.device) -> str | None:
    """Why PyTorch's own attention is the better choice on this device; None if it is not."""
    if device.type != "cuda" or (capability := torch.cuda.get_device_capability(device)) < HOPPER:
        return None
    return "compute capability {}.{}: from 9.0 on PyTorch has cuDNN's kernels".format(*capability)


def _xformers_obstacle(device: torch.device, packed: bool) -> str | None:
    """Why xformers cannot run on this device, in one line; None if a trial has shown that it can."""
    if device.type != "cuda":
        return f"xformers needs CUDA, the device is {device.type}"
    if unloaded := load_xformers():
        return unloaded
    try:
        _try_xformers(device, packed)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return _in_one_line(error)
    return None


def load_xformers() -> str | None:
    """Load xformers' extension and the CUDA runtime that it is linked against; call it before importing xformers.

    Returns one line with the reason and the fix if it does not load, else None.
    """
    package = importlib.util.find_spec("xformers")
    if package is None:
        return "xformers is not installed: pip install xformers"
    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    try:
        if extension and extension.origin:
            _load(extension.origin)
    except OSError as error:
        matching = f"install the version of xformers that was built for PyTorch {torch.__version__}"
        fix = f"pip install {CUDA_12_PACKAGE}" if CUDA_12 in str(error) else matching
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
    """The path of CUDA 12's runtime in the package from PyPI; None if it is not installed."""
    try:
        files = importlib.metadata.files(CUDA_12_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == CUDA_12), None)


@torch.inference_mode(False)  # the trial needs gradients, whatever mode the caller is in
def _try_xformers(device: torch.device, packed: bool) -> None:
    """Run forward and backward in every precision and with every kind of mask that training uses; raises its errors."""
    length, heads = 13, 2
    padding = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for causal, mask in ((False, None), (True, None), (False, padding)):
            # Zeros: drawing random numbers here would change those of the run.
            tensor = torch.zeros(1, heads, length, 64, dtype=dtype, device=device, requires_grad=True)
            for packing in (None, Packing([1, length - 1])) if packed and mask is None else (None,):
                out, _ = xformers(nn.Identity(), tensor, tensor, tensor, mask, is_causal=causal, packing=packing)
                torch.autograd.grad(out.sum(), tensor)[0].cpu()  # synchronises, so that errors of the kernels show


def _in_one_line(error: Exception) -> str:
    """The first line of a message; of xformers' list of operators, what the last and most general one lacks."""
    _, is_list, reasons = str(error).rpartition("is not supported because:")
    lines = [line.strip() for line in reasons.splitlines() if line.strip()]
    return "; ".join(lines if is_list else lines[:1]) or type(error).__name__


def _repeat_heads(module: nn.Module, heads: Tensor) -> Tensor:
    """Grouped-query attention: keys or values [B, G, K, d] -> one per query head, [B, H, K, d]."""
    groups = getattr(module, "num_key_value_groups", 1)
    return heads.repeat_interleave(groups, dim=1) if groups > 1 else heads


def _is_causal(module: nn.Module, attention_mask: Tensor | None, is_causal: bool | None) -> bool:
    """A mask already has the causal pattern; without one the call, or else the module, decides."""
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
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T scaling + mask) V by PyTorch: `query` [B, H, L, d] -> [B, L, H, d], as transformers expects.

    `key` and `value` are [B, G, K, d]; `attention_mask` broadcasts to [B, H, L, K], bool (true: attend) or additive.
    With `packing` the row, of B = 1, holds several sequences, and a token attends to its own alone.
    """
    heads = query, _repeat_heads(module, key), _repeat_heads(module, value)
    causal = _is_causal(module, attention_mask, is_causal)
    options: dict[str, Any] = {"dropout_p": dropout, "is_causal": causal, "scale": scaling}
    if packing is not None:
        return _one_by_one(heads, packing, options), None
    out = F.scaled_dot_product_attention(*heads, attn_mask=attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # else blocks would be compiled for the very lengths
def _one_by_one(heads: tuple[Tensor, Tensor, Tensor], packing: Packing, options: dict[str, Any]) -> Tensor:
    """Query, key and value [1, H, N, d] -> [1, N, H, d], one sequence after the other.

    A CPU loses little by it (docs/recipes.md); a GPU has xformers' kernels.
    """
    parts = zip(*(part.split(packing.lengths, dim=2) for part in heads), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, **options).transpose(1, 2) for part in parts], dim=1)


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean or additive mask, expanded to additive [B, H, L, K] in the query's dtype.

    xformers does not broadcast, and its kernels need rows that start at a multiple of 8 elements.
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
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`sdpa` by xformers' memory_efficient_attention."""
    # Imported here: optional, and only after `load_xformers`.
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias: Any = None
    causal = _is_causal(module, attention_mask, is_causal)
    heads = [t.transpose(1, 2) for t in (query, _repeat_heads(module, key), _repeat_heads(module, value))]
    if packing is not None:
        return _together(heads, packing, causal, {"p": dropout, "scale": scaling}), None
    if causal:
        bias = LowerTriangularMask()
    elif attention_mask is not None:
        bias = _additive(attention_mask, query)
    return memory_efficient_attention(*heads, attn_bias=bias, p=dropout, scale=scaling), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as `_one_by_one`
def _together(heads: list[Tensor], packing: Packing, causal: bool, options: dict[str, Any]) -> Tensor:
    """Query, key and value [1, N, H, d] -> [1, N, H, d], all sequences at once."""
    from xformers.ops import memory_efficient_attention

    bias = _block_diagonal(packing, causal, heads[0].device)
    out: Tensor = memory_efficient_attention(*heads, attn_bias=bias, **options)
    return out


def _block_diagonal(packing: Packing, causal: bool, device: torch.device) -> Any:
    """The mask of xformers in which a token attends to its own sequence, or to what is before it in that."""
    if causal not in packing.masks:
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        mask = BlockDiagonalMask.from_seqlens(packing.lengths, device=device)
        packing.masks[causal] = mask.make_causal() if causal else mask
    return packing.masks[causal]


WITHOUT_MASK = "_without_mask"


def without_mask(name: str) -> str:
    """The variant of kernel `name` for a model that never gets a mask, for which transformers builds none.

    It would look for packed texts in the positions, which synchronises with the GPU, and make a mask of them.
    """
    return f"{name}{WITHOUT_MASK}" if name in KERNELS.values() else name


def packs(name: str) -> bool:
    """Whether the attention of this name is a kernel that knows packed sequences, which no other does."""
    return name.removesuffix(WITHOUT_MASK) in KERNELS.values()


for _name, _function in (("mama_xformers", xformers), ("mama_sdpa", sdpa)):
    AttentionInterface.register(_name, _function)
    AttentionInterface.register(_name + WITHOUT_MASK, _function)
    # transformers passes a mask to a custom attention only if a mask function is registered under its name.
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
