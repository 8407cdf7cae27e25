"""The image tower: a ViT from transformers that returns one global feature and those of the patches.

Letters: b images, P patches, n patches of all images that are computed, d width of the tower.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mama.errors import ConfigError
from mama.model import tissue
from mama.model.backbones import blocks_of, build_backbone, drop_pooler, fuse_gelu
from mama.settings.schema import Tokens, VisionConfig

# The name of the norm after the last block in each image architecture.
VISION_MODELS = {"dinov2": "layernorm", "dinov2_with_registers": "layernorm", "vit": "layernorm", "dinov3_vit": "norm"}
LATEST = 4096  # images


class ImageFeatures(NamedTuple):
    """What the image tower makes of b images. A tuple, so that ZeRO-3 finds the tensors in it."""

    pooled: Tensor  # [b, d], the global feature: the mean over all tokens before the last norm
    patches: Tensor  # [n, d], those of the local term, normed; those of one image behind those of the one before
    counts: list[int]  # patches of each image, n together
    kept: Tensor | None  # bool [b, P], which patches these are; None: all


class VisionTower(nn.Module):
    """A ViT from transformers, DINOv2 with registers by default; every trainable parameter serves its two features."""

    def __init__(self, backbone: PreTrainedModel, tokens: Tokens = "all", local_block: int | None = None) -> None:
        """`tokens` and `local_block` as in `VisionConfig`.

        Raises `ConfigError` for a backbone that the tower cannot be built of, and for a block that it does not have.
        """
        super().__init__()
        shape = backbone.config
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(shape, name), int):  # position embeddings are resized as a square
                raise ConfigError(f"vision.config: {name} is {getattr(shape, name)}, but must be one number of pixels")
        self.only_tissue = tokens == "tissue"
        self.local_block = local_block
        if local_block is not None:
            count = len(blocks_of(backbone))
            if not 0 <= local_block <= count:
                raise ConfigError(f"vision.local_block: {local_block}, but the model has {count}; name 0 to {count}")
            if local_block == count:
                self.local_block = None  # that is the last
        self.lengths: deque[int] = deque(maxlen=LATEST)  # tokens of the latest images in training, where they differ
        if self.only_tissue:
            tissue.require_packing(backbone)
        drop_pooler(backbone)
        self.backbone = backbone
        # The tower applies the last norm itself: the global feature is read before it, the patches after it.
        norm = VISION_MODELS[shape.model_type]
        self.norm = cast(nn.Module, getattr(backbone, norm))
        setattr(backbone, norm, nn.Identity())
        self.prefix = 1 + getattr(shape, "num_register_tokens", 0)
        # Only `vit` needs the argument; `dinov3_vit` has no position embeddings.
        self.arguments = {"interpolate_pos_encoding": True} if shape.model_type == "vit" else {}
        for name, parameter in backbone.named_parameters():
            if name.endswith("mask_token"):  # only masked-image pre-training uses one
                parameter.requires_grad_(False)
        _empty_to_buffers(backbone)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size and not any(module.padding):
                module.__class__ = PatchProjection
        fuse_gelu(backbone)

    @property
    def width(self) -> int:
        """d, of both features."""
        return int(self.backbone.config.hidden_size)

    @property
    def patch(self) -> int:
        """The side of a patch in pixels."""
        return int(self.backbone.config.patch_size)

    def patches_of(self, image_size: Sequence[int]) -> int:
        """P, the patches of an image (H, W)."""
        return math.prod(side // self.patch for side in image_size)

    def forward(self, images: Tensor, tissue_patches: bool = False) -> ImageFeatures:
        """Encode [b, 1, H, W] in [-1, 1]; with `tissue_patches` only patches with tissue are returned, always."""
        pixels = images.expand(-1, self.backbone.config.num_channels, -1, -1)
        kept, counts = None, [self.patches_of(images.shape[2:])] * len(images)
        if self.only_tissue or tissue_patches:
            kept = tissue.kept_patches(images, self.patch)
            counts = kept.sum(1).tolist()  # the one place where a GPU is waited for
        if self.only_tissue:
            assert kept is not None
            if self.training:
                self.lengths += [self.prefix + count for count in counts]
            pooled, patches = tissue.encode(
                self.backbone, pixels, self.arguments, self.prefix, kept, counts, self.local_block
            )
            return ImageFeatures(pooled, self.norm(patches), counts, kept)
        tokens, local = self._states(pixels)  # [b, prefix + P, d] each
        patches = local[:, self.prefix :]
        if kept is None:
            return ImageFeatures(tokens.mean(1), self.norm(patches).flatten(0, 1), counts, None)
        patches = patches.flatten(0, 1).index_select(0, tissue.places(kept, sum(counts)))
        return ImageFeatures(tokens.mean(1), self.norm(patches), counts, kept)

    def _states(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The states of all tokens behind the last block, and behind the one of the patches, before any norm.

        The latter are what the next block is given. That is outside of what is compiled or computed again in the
        backward pass, and with the hooks of ZeRO-3 on the output of their own block.
        """
        read: list[Tensor] = []
        with ExitStack() as stack:
            if self.local_block is not None:
                next_block = blocks_of(self.backbone)[self.local_block]
                hook = next_block.register_forward_pre_hook(lambda _, given: read.append(given[0]), prepend=True)
                stack.callback(hook.remove)
            tokens = self.backbone(pixel_values=pixels, **self.arguments).last_hidden_state
        return tokens, read[0] if read else tokens


class PatchProjection(nn.Conv2d):
    """The convolution that embeds patches, on a GPU as one matrix product.

    With so few channels cuDNN is six times slower (docs/benchmarks.md).
    """

    def forward(self, images: Tensor) -> Tensor:
        """[b, c, H, W] -> [b, d, H / patch, W / patch]."""
        if not images.is_cuda:
            return super().forward(images)
        height, width = self.kernel_size
        patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
        tokens = F.linear(patches.flatten(3), self.weight.flatten(1), self.bias)  # [b, h, w, d]
        return tokens.permute(0, 3, 1, 2)


def build_vision(config: VisionConfig, attention: str, empty: bool = False) -> VisionTower:
    """The image tower, pretrained or random, see `VisionConfig`. Raises `ConfigError` as `build_backbone` does."""
    backbone = build_backbone("vision", config, VISION_MODELS, attention, empty)
    tower = VisionTower(backbone, config.tokens, config.local_block)
    if config.freeze_norm:
        tower.norm.requires_grad_(False)
    return tower


def _empty_to_buffers(backbone: PreTrainedModel) -> None:
    """Turn empty parameters (no register tokens), which ZeRO-3 cannot shard, into buffers of the same name.

    In bf16, because `torch.cat` promotes to the widest dtype of its parts, also of empty ones.
    """
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.numel():
                delattr(module, name)
                module.register_buffer(name, parameter.detach().bfloat16())
