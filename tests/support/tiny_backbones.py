"""Settings of a tiny backbone of every supported architecture, and the names of its parts."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mama.model.text_tower import TextTower

KERNEL = "mama_sdpa"
REGISTERS = 3
VISION: dict[str, dict[str, Any]] = {
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "num_register_tokens": REGISTERS,
    },
    "dinov2": {
        "model_type": "dinov2", "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2,
    },
    "vit": {
        "model_type": "vit", "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    },
    "dinov3_vit": {
        "model_type": "dinov3_vit", "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32, "num_register_tokens": REGISTERS,
    },
}  # fmt: skip
LAST_NORM = {"dinov2_with_registers": "layernorm", "dinov2": "layernorm", "vit": "layernorm", "dinov3_vit": "norm"}
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None,
    },
    "bert": {
        "model_type": "bert", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
    },
}  # fmt: skip


def base_of(tower: TextTower) -> PreTrainedModel:
    inner = tower.backbone.get_base_model() if isinstance(tower.backbone, PeftModel) else tower.backbone
    return cast(PreTrainedModel, inner)


def words_of(tower: TextTower) -> nn.Embedding:
    return cast(nn.Embedding, base_of(tower).get_input_embeddings())
