"""The two towers: transformers backbones that give one global feature and many local ones.

Letters: b images, u texts, P patches, S sentences, L tokens, d width of the tower.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mama.config import ConfigError, TextConfig, VisionConfig
from mama.data import Texts
from mama.tokens import Tokenizer

log = logging.getLogger(__name__)

VISION_MODELS = ("dinov2", "dinov2_with_registers")
# Which projections LoRA adapts, by architecture (METHOD: GPT-2 c_attn; Llama q_proj and v_proj).
LORA_TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
TOKEN_EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens"}
BLOCKS = {"gpt2": "h", "llama": "layers"}


class VisionTower(nn.Module):
    """A ViT of transformers, DINOv2 with registers by default."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        kind = backbone.config.model_type
        if kind not in VISION_MODELS:
            raise ConfigError(f"vision: {kind} is not one of {', '.join(VISION_MODELS)}")
        self.backbone = backbone
        # The global feature is read before the last norm, the patches after it: so it stands here.
        self.norm = cast(nn.Module, backbone.layernorm)
        backbone.layernorm = nn.Identity()
        self.prefix = 1 + getattr(backbone.config, "num_register_tokens", 0)
        mask_token = getattr(backbone.embeddings, "mask_token", None)
        if mask_token is not None:  # only masked-image pre-training uses it
            mask_token.requires_grad_(False)

    @property
    def width(self) -> int:
        return int(self.backbone.config.hidden_size)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[b, 1, H, W] in [-1, 1] -> global feature [b, d] and normed patches [b, P, d]."""
        channels = self.backbone.config.num_channels
        tokens = self.backbone(pixel_values=images.expand(-1, channels, -1, -1)).last_hidden_state
        return tokens.mean(1), self.norm(tokens[:, self.prefix :])


class TextTower(nn.Module):
    """A causal language model of transformers, without its LM head."""

    def __init__(self, backbone: PreTrainedModel | PeftModel, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width

    def forward(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """`Texts` of u rows -> mean over token states [u, d] and the states at separators [u, S, d].

        No mask goes to the model: padding is on the right and attention is causal, so that no token
        sees any, and the kernels keep their fast causal path.
        """
        states = self.backbone(input_ids=texts.tokens, use_cache=False).last_hidden_state  # [u, L, d]
        weights = texts.mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(1) / weights.sum(1)
        rows = torch.arange(len(states), device=states.device)[:, None]
        return mean, states[rows, texts.separators]

    def merge_adapters(self) -> None:
        """Add the LoRA updates to their base weights, which is exact to rounding in fp32, and drop the adapters."""
        if isinstance(self.backbone, PeftModel):
            self.backbone = cast(PreTrainedModel, cast(Any, self.backbone).merge_and_unload())


def build_vision(config: VisionConfig, attention: str) -> VisionTower:
    """The image tower, from pretrained weights or at random; see `VisionConfig`."""
    if config.model is None:
        return VisionTower(AutoModel.from_config(_architecture("vision", config.config), attn_implementation=attention))
    return VisionTower(_pretrained("vision.model", config.model, attention))


def build_text(config: TextConfig, tokenizer: Tokenizer, attention: str) -> TextTower:
    """The text tower, its base frozen but for LoRA adapters and the two tokens of our own."""
    if config.model is None:
        shape = _architecture("text", {**config.config, "vocab_size": len(tokenizer)})
        backbone = AutoModel.from_config(shape, attn_implementation=attention)
    else:
        backbone = _pretrained("text.model", config.model, attention)
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    kind = backbone.config.model_type
    if kind not in LORA_TARGETS:
        raise ConfigError(f"text: {kind} is not one of {', '.join(LORA_TARGETS)}")
    if config.layers is not None:
        blocks = getattr(backbone, BLOCKS[kind])
        if not 1 <= config.layers <= len(blocks):
            raise ConfigError(f"text.layers: {config.layers}, but the model has {len(blocks)}; name 1 to {len(blocks)}")
        setattr(backbone, BLOCKS[kind], blocks[: config.layers])
        backbone.config.num_hidden_layers = config.layers
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS[kind],
        fan_in_fan_out=kind == "gpt2",  # GPT-2 stores its projections transposed
        trainable_token_indices={TOKEN_EMBEDDINGS[kind]: [tokenizer.separator_id, tokenizer.pad_id]},
    )
    width = int(backbone.config.hidden_size)
    return TextTower(get_peft_model(backbone, lora), width)


def locate(field: str, model: str) -> tuple[str, dict[str, Any]]:
    """Arguments of transformers' `from_pretrained` for a hub name, a folder, a GGUF file, or
    `package:NAME/FILE.gguf`, a GGUF file inside an installed Python package."""
    if model.startswith("package:"):
        package, _, file = model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{field}: the Python package {package} is not installed; see the head of the recipe")
        model = str(Path(spec.submodule_search_locations[0]) / file)
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise ConfigError(f"{field}: {path}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    return model, {}


def _architecture(section: str, shape: dict[str, Any]) -> PretrainedConfig:
    if "model_type" not in shape:
        raise ConfigError(
            f"{section}.config: model_type is missing; with {section}.model=null it names the architecture"
        )
    try:
        architecture = AutoConfig.for_model(**shape)
    except (ValueError, TypeError, StrictDataclassFieldValidationError) as error:
        raise ConfigError(f"{section}.config: {' '.join(str(error).split())}") from error
    known = {*type(architecture)().to_dict(), *architecture.attribute_map}  # transformers keeps any key it is given
    for key in shape:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{section}.config: {architecture.model_type} has no setting {key}{hint}")
    return architecture


def _pretrained(field: str, model: str, attention: str) -> PreTrainedModel:
    """Load in fp32 and say what was loaded; a missing tensor is an error, an unexpected one (an LM head) is counted."""
    name, arguments = locate(field, model)
    try:
        backbone, info = AutoModel.from_pretrained(
            name, attn_implementation=attention, dtype=torch.float32, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{field}: {model} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    log.info(
        "%s: %d tensors, %d missing, %d unexpected", model, len(backbone.state_dict()), len(missing), len(unexpected)
    )
    if missing:
        raise ConfigError(f"{field}: {model} lacks {len(missing)} tensors, the first is {missing[0]}")
    return backbone
