"""The text tower: a language model from transformers that returns one global feature and those of the sentences.

Letters: u distinct texts, N tokens of all texts, S sentences of the longest text, L tokens, d width of the tower, V
tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mama.data.batches import Rows, Texts
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.model.attention import packs, without_mask
from mama.model.backbones import build_backbone, drop_pooler, fuse_gelu
from mama.model.packing import Packing
from mama.settings.schema import Sentences, TextConfig


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
        drop_pooler(base)
        fuse_gelu(base)
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
