"""The image tower on the patches that hold tissue: the others are left out before the first block.

The tokens of all images stand in one row, and attend to those of their own image alone.

Letters: b images, P patches of an image, n those of all images that are kept, N tokens of all images, d width.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mama.data.images import BACKGROUND
from mama.errors import ConfigError
from mama.model.attention import KERNELS
from mama.model.backbones import blocks_of
from mama.model.packing import Packing

# In [-1, 1], half a grey level above the background: bfloat16, which resolves half levels there, has the same tissue.
DARKEST = (BACKGROUND + 0.5) / 127.5 - 1


def kept_patches(images: Tensor, patch: int) -> Tensor:
    """Which patches of [b, 1, H, W] in [-1, 1] have a pixel of tissue, bool [b, P]; of an image without any, all."""
    tissue = F.max_pool2d(images, patch).flatten(1) > DARKEST
    return tissue | ~tissue.any(1, keepdim=True)


def encode(
    backbone: PreTrainedModel,
    pixels: Tensor,
    arguments: dict[str, Any],
    prefix: int,
    kept: Tensor,
    counts: list[int],
    local_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """[b, c, H, W] -> the mean over the tokens of each image [b, d], and the `kept` patches [n, d], before any norm.

    `kept`, bool [b, P], has the `counts` of each image on the host, without which a GPU would have to be waited for.
    `prefix` tokens of each image, class and registers, are none of a patch; `arguments` are those of the embedding.
    Patches are those behind the block `local_block`, 0 before the first; None: the last.
    """
    parts = cast(Any, backbone)
    packing = Packing(prefix + count for count in counts)
    embedded = parts.embeddings(pixels, **arguments)  # [b, prefix + P, d]: each patch has the position of its place
    rows = places(F.pad(kept, (prefix, 0), value=True), sum(packing.lengths))
    number = rows % embedded.shape[1]  # [N], of each token in its image
    turns = {}
    if hasattr(parts, "rope_embeddings"):  # DINOv3 turns queries and keys by the place of their patch
        cos, sin = parts.rope_embeddings(pixels)  # [P, width of a head]
        whole = F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))  # the others not at all
        turns["position_embeddings"] = tuple(part.index_select(0, number) for part in whole)
    # No view of another tensor: the first block would be compiled for one, and the others anew.
    row = embedded.flatten(0, 1)[None].index_select(1, rows)  # [1, N, d]
    local = None
    for before, block in enumerate(blocks_of(backbone)):
        local = row if before == local_block else local
        row = block(row, packing=packing, **turns)
    local = row if local is None else local
    patches = local[0].index_select(0, places(number >= prefix, sum(counts)))
    return packing.mean(row[0]), patches


def require_packing(backbone: PreTrainedModel) -> None:
    """Raise `ConfigError` for a backbone in which images that stand in one row would not be computed by themselves."""
    rate = getattr(backbone.config, "drop_path_rate", 0.0)
    if rate:
        raise ConfigError(
            f"vision.tokens: with tissue all images stand in one row, and drop_path_rate {rate} drops a block for a "
            "whole row; set drop_path_rate=0, or tokens=all"
        )
    kernel = backbone.config._attn_implementation
    if kernel not in KERNELS.values():
        raise ConfigError(f"vision.tokens: the attention {kernel} does not know where an image of a row ends; use ours")


def places(mask: Tensor, count: int) -> Tensor:
    """int64 [count]: the places of the true entries of a `mask` that has `count`, in order.

    `nonzero` would wait for a GPU to count them.
    """
    return mask.flatten().byte().argsort(descending=True, stable=True)[:count]
