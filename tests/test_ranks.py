"""Two gloo ranks under the real DeepSpeed give the loss and the gradient of one rank on the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mama import attention, augment
from mama.config import Config, DataConfig, HeadsConfig, LossConfig, OptimConfig, TextConfig, TrainConfig, VisionConfig
from mama.data import Batch, Collate, Pair
from mama.errors import RankError
from mama.launch import run_on_ranks
from mama.tokens import Tokenizer

WORDS = ["[UNK]", "alpha", "beta", "gamma", "delta", "epsilon"]
PAIRS = 8


def tiny(ranks: int, **train: Any) -> Config:
    vision = {
        "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": 32, "patch_size": 8,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2,
    }  # fmt: skip
    text = {
        "model_type": "gpt2", "vocab_size": 64, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 2,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return Config(
        seed=1,
        data=DataConfig(image_size=(32, 16), max_tokens=64, workers=0),
        vision=VisionConfig(model=None, config=vision),
        text=TextConfig(model=None, config=text, lora_rank=2, lora_dropout=0.0),
        heads=HeadsConfig(embed_dim=16, hidden_dim=16, view_hidden_dim=16),
        loss=LossConfig(local_start=0, positives="text"),
        optim=OptimConfig(clip_norm=0.0, warmup_steps=1),
        train=replace(
            TrainConfig(
                steps=4, global_batch=PAIRS, micro_batch=PAIRS // ranks, ranks=ranks, precision="fp32",
                activation_checkpointing=True,
            ),
            **train,
        ),
    )  # fmt: skip


def tokenizer() -> Tokenizer:
    fast = FastTokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]"))


def batch_of(config: Config, rows: range) -> Batch:
    """Pairs whose texts have 1 to 4 sentences, so that ranks differ in their longest text."""
    pairs = []
    for row in rows:
        rng = np.random.default_rng(row)
        size = config.data.image_size
        # Rows 0 and 5 share their text, on different ranks.
        text_rng = np.random.default_rng(0 if row == 5 else row)
        count = 4 if row == 7 else int(text_rng.integers(1, 3))
        text = [" ".join(text_rng.choice(WORDS[1:], 3)) for _ in range(count)]
        v, w = (rng.integers(0, 256, size, dtype=np.uint8) for _ in range(2))
        change_v, change_w = (augment.draw(config.data.augment, size, rng) for _ in range(2))
        pairs.append(Pair(str(row), v, w, change_v, change_w, text, text if row % 2 else ["beta"]))
    return Collate(tokenizer(), config.data.max_tokens)(pairs)


def gradients(config: Config) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """On each rank: its share of the batch through the real engine; the full gradient of every parameter."""
    from deepspeed.utils import safe_get_full_grad

    from mama.dist import rank, world_size
    from mama.engine import join_ranks, start_engine
    from mama.losses import objective
    from mama.model import build

    join_ranks()
    share = PAIRS // world_size()
    batch = batch_of(config, range(rank() * share, (rank() + 1) * share))
    model = build(config, tokenizer(), attention.choose("sdpa", torch.device("cpu")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    engine = start_engine(model, config)
    total, terms = objective(engine(batch), batch, config.loss, step=0)
    engine.backward(total)
    grads = {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters() if p.requires_grad}
    result = total.item(), {name: term.item() for name, term in terms.items()}, grads
    torch.distributed.destroy_process_group()
    return result


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_equal_one_rank_on_the_concatenated_batch(stage: int) -> None:
    total, terms, one = run_on_ranks(gradients, tiny(1, zero_stage=stage))
    total2, terms2, two = run_on_ranks(gradients, tiny(2, zero_stage=stage))
    assert total2 == pytest.approx(total, abs=1e-5)
    assert terms2 == pytest.approx(terms, abs=1e-5)
    assert one.keys() == two.keys()
    assert any("lora_A" in name for name in one)
    for name, gradient in one.items():
        if "k_proj.bias" not in name:  # softmax does not see it
            assert gradient.abs().max() > 0, name
        scale = max(1.0, float(gradient.abs().max()))
        assert torch.allclose(two[name] / scale, gradient / scale, atol=2e-6), name


def failing(config: Config) -> None:
    import os

    from mama.engine import join_ranks

    join_ranks()
    if os.environ["RANK"] == "1":
        raise ValueError("rank one has a problem")
    torch.distributed.barrier()


def test_a_dead_rank_ends_the_others_and_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed.*rank one has a problem"):
        run_on_ranks(failing, tiny(2))
