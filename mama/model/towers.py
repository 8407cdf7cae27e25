"""The two towers: transformers backbones that return one global feature and many local ones.

Letters: b images, u distinct texts, P patches, n patches of all images that are computed, N tokens of all images or
texts, S sentences of the longest text, L tokens, d width of the tower, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from mama.data.batches import Rows, Texts
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model import tissue
from mama.model.attention import packs, without_mask
from mama.model.backbones import blocks_of, build_backbone
from mama.model.packing import Packing
from mama.settings.schema import Sentences, TextConfig, Tokens, VisionConfig

# The name of the norm after the last block in each image architecture.
VISION_MODELS = {"dinov2": "layernorm", "dinov2_with_registers": "layernorm", "vit": "layernorm", "dinov3_vit": "norm"}


@dataclass(frozen=True)
class TextModel:
    """The names of the parts of a language model in transformers."""

    embedding: str  # token embedding
    blocks: str  # list of transformer blocks
    adapted: tuple[str, ...]  # projections that LoRA adapts, see docs/METHOD.md, "Towers"
    causal: bool = True
    transposed: bool = False  # GPT-2 stores its projections [in, out]


TEXT_MODELS = {
    "gpt2": TextModel("wte", "h", ("c_attn",), transposed=True),
    "llama": TextModel("embed_tokens", "layers", ("q_proj", "v_proj")),
    "bert": TextModel("word_embeddings", "encoder.layer", ("query", "value"), causal=False),
}


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
        _drop_pooler(backbone)
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
        _fuse_gelu(backbone)

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


class OwnTokens(TrainableTokensLayer):
    """peft's token embedding with a few trained rows, without its synchronous copy of row numbers at every step."""

    own_indices: Tensor

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """The embedding [V, d] with the trained rows in place."""
        (name,) = active_adapters
        embedding = cast(Tensor, self.base_layer.weight)
        return embedding.index_copy(0, self.own_indices, self.trainable_tokens_delta[name].to(embedding))


class TextTower(nn.Module):
    """A language model from transformers, causal or bidirectional, without its head.

    With `packing` all texts share one row, in which they do not see each other.
    """

    def __init__(self, backbone: PreTrainedModel | PeftModel, width: int, packing: bool, sentences: Sentences) -> None:
        """`sentences` as in `TextConfig`.

        Raises `ValueError` for an attention in which packed texts would see each other.
        """
        super().__init__()
        base = cast(PreTrainedModel, backbone.get_base_model()) if isinstance(backbone, PeftModel) else backbone
        _drop_pooler(base)
        _fuse_gelu(base)
        self.backbone = backbone
        self.width = width
        self.packing = packing
        self.reads_alone = sentences == "alone"
        self.masked = not (packing or TEXT_MODELS[base.config.model_type].causal)
        attention = str(base.config._attn_implementation)
        self.packs = packs(attention)
        if packing and not self.packs:
            raise ValueError(f"attention: {attention} knows no packed texts; use one of ours, or text.packing=false")
        if not self.masked:
            base.set_attn_implementation(without_mask(attention))

    def forward(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """`Texts` of u rows -> mean over token states [u, d] and the states at separators [u, S, d]."""
        mean, states, first = self._read(texts, self.packing)
        return mean, states[first[:, None] + texts.separators]

    def alone(self, texts: Texts) -> Tensor:
        """Sentence features [u, S, d] in place of those states, each of a sentence that is read as a text of its own.

        Packed wherever the kernel can: padded to the longest one, many short sentences would be mostly padding.
        """
        return self._read(texts.sentences, self.packs)[0][texts.sentence_row]

    def _read(self, rows: Rows, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """u rows of tokens -> mean over token states [u, d], all states, and the number [u] of the first of each row.

        All states are [N, d], or with padding [u L, d].
        """
        return self._packed(rows) if packed else self._padded(rows)

    def _packed(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """All rows one behind the other in one, at positions that begin anew; nothing is computed on padding."""
        packing, device = Packing(rows.lengths), rows.tokens.device
        numbers, places = packing.segments(device), packing.positions(device)
        states = self.backbone(
            input_ids=rows.tokens[numbers, places][None], position_ids=places[None], packing=packing, use_cache=False
        ).last_hidden_state[0]  # [N, d]
        return packing.mean(states), states, packing.starts(device)

    def _padded(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """A row for each.

        A causal model gets no mask: padding is on the right, where no token attends to it, and the kernels keep their
        fast causal path. A bidirectional one gets the padding mask.
        """
        mask = rows.mask
        states = self.backbone(
            input_ids=rows.tokens, attention_mask=mask if self.masked else None, use_cache=False
        ).last_hidden_state  # [u, L, d]
        weights = mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(1) / weights.sum(1)
        first = torch.arange(len(states), device=states.device) * states.shape[1]
        return mean, states.flatten(0, 1), first

    def merge_adapters(self) -> None:
        """Merge LoRA updates and trained tokens into the base weights and remove peft's modules.

        Exact up to fp32 rounding; does nothing if the whole model is trained.
        """
        if isinstance(self.backbone, PeftModel):
            self.backbone = cast(PreTrainedModel, cast(Any, self.backbone).merge_and_unload())


def build_vision(config: VisionConfig, attention: str, empty: bool = False) -> VisionTower:
    """The image tower, pretrained or random, see `VisionConfig`. Raises `ConfigError` as `build_backbone` does."""
    backbone = build_backbone("vision", config, VISION_MODELS, attention, empty)
    tower = VisionTower(backbone, config.tokens, config.local_block)
    if config.freeze_norm:
        tower.norm.requires_grad_(False)
    return tower


def build_text(config: TextConfig, tokenizer: Tokenizer, attention: str, empty: bool = False) -> TextTower:
    """The text tower, tuned according to `config.tune`, with an embedding for every token of `tokenizer`.

    Raises `ConfigError` as `build_backbone` does, and for `text.layers` that the model does not have.
    """
    backbone = build_backbone("text", config, TEXT_MODELS, attention, empty, vocab_size=len(tokenizer))
    if config.model is not None:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Our tokenizer has its own padding token; the model's padding token is a plain word and must be trained.
    cast(nn.Embedding, backbone.get_input_embeddings()).padding_idx = None
    model = TEXT_MODELS[backbone.config.model_type]
    if model.causal:  # gets no mask; keep transformers from searching for padding, which synchronises with the GPU
        backbone.config.pad_token_id = None
    if config.layers is not None:
        _keep_layers(backbone, model.blocks, config.layers)
    width = int(backbone.config.hidden_size)
    tuned = _tuned(backbone, model, config, [tokenizer.separator_id, tokenizer.pad_id])
    return TextTower(tuned, width, config.packing, config.sentences)


def _tuned(
    backbone: PreTrainedModel, model: TextModel, config: TextConfig, own_tokens: list[int]
) -> PreTrainedModel | PeftModel:
    """Make all of `backbone` trainable, or only `own_tokens`, with or without LoRA adapters."""
    if config.tune == "full":
        return backbone
    tuning: TrainableTokensConfig | LoraConfig
    if config.tune == "frozen":
        tuning = TrainableTokensConfig(token_indices=own_tokens, target_modules=[model.embedding])
    else:
        tuning = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(model.adapted),
            fan_in_fan_out=model.transposed,
            trainable_token_indices={model.embedding: own_tokens},
        )
    tuned = cast(PeftModel, get_peft_model(backbone, tuning))
    for module in tuned.modules():
        if isinstance(module, TrainableTokensLayer):
            module.__class__ = OwnTokens
            module.register_buffer("own_indices", torch.tensor(own_tokens), persistent=False)
    return tuned


def _keep_layers(backbone: PreTrainedModel, path: str, count: int) -> None:
    """Keep the first `count` of the transformer blocks at `path`."""
    parent, _, name = path.rpartition(".")
    owner = backbone.get_submodule(parent)
    blocks = getattr(owner, name)
    if not 1 <= count <= len(blocks):
        raise ConfigError(f"text.layers: {count}, but the model has {len(blocks)}; name 1 to {len(blocks)}")
    setattr(owner, name, blocks[:count])
    backbone.config.num_hidden_layers = count


def _empty_to_buffers(backbone: PreTrainedModel) -> None:
    """Turn empty parameters (no register tokens), which ZeRO-3 cannot shard, into buffers of the same name.

    In bf16, because `torch.cat` promotes to the widest dtype of its parts, also of empty ones.
    """
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.numel():
                delattr(module, name)
                module.register_buffer(name, parameter.detach().bfloat16())


def _fuse_gelu(backbone: PreTrainedModel) -> None:
    """Replace GPT-2's GELU, written out in Python, by the kernel, which saves memory (docs/benchmarks.md)."""
    for module in backbone.modules():
        for name, part in module.named_children():
            if isinstance(part, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _drop_pooler(backbone: PreTrainedModel) -> None:
    """Remove the pooler of BERT and ViT: no tower uses it, so its parameters would never get a gradient."""
    if hasattr(backbone, "pooler"):
        cast(Any, backbone).pooler = None
