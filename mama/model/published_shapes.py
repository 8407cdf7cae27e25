"""The shapes of the paper's towers, so that a dry run needs neither weights nor a network."""

from __future__ import annotations

from typing import Any

# Hub name -> the sizes in its config.json (huggingface.co, read in November 2026), without the tokens that begin and
# end a text, which only the tokenizer uses.
SHAPES: dict[str, dict[str, Any]] = {
    "facebook/dinov2-with-registers-base": {
        "model_type": "dinov2_with_registers", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 14, "image_size": 518, "num_register_tokens": 4,
    },
    "stanford-crfm/BioMedLM": {
        "model_type": "gpt2", "vocab_size": 28896, "n_positions": 1024, "n_embd": 2560, "n_layer": 32, "n_head": 20,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
