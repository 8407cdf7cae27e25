"""Two gloo ranks under the real DeepSpeed give the loss and the gradient of one rank on the whole batch."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mama.data import augment
from mama.data.batches import Batch, Collate, Pair
from mama.data.tokenizer import Tokenizer
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.heads import LogitScale
from mama.model.mama_model import MamaModel, build
from mama.objective.losses import objective
from mama.runtime.errors import RankError
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import (
    Config,
    DataConfig,
    HeadsConfig,
    LossConfig,
    Norm,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from mama.train import grad_cache

pytestmark = pytest.mark.ranks

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
        change_v, change_w = (augment.draw(config.data.augment, pixels, rng) for pixels in (v, w))
        pairs.append(Pair(str(row), v, w, change_v, change_w, text, text if row % 2 else ["beta"]))
    return Collate(tokenizer(), config.data.max_tokens)(pairs)


IN_FRONT_OF_NORMS = r"(patch|sentence)_head\.[03]\.bias|view_head\.0\.bias"

Result = tuple[float, dict[str, float], dict[str, torch.Tensor]]


def model_of(config: Config) -> MamaModel:
    model = build(config, tokenizer(), attention.choose("sdpa", torch.device("cpu")))
    prepare_blocks(model, config.train, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0, which would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return model


def seed(n: int) -> None:
    torch.manual_seed(n)


def by_autograd(config: Config) -> Result:
    """The whole batch in this process, without DeepSpeed: micro-batches with their graphs, joined, one loss."""
    count = config.train.accumulation(1)
    model = model_of(config).train()
    parts = []
    for n in range(count):
        seed(n)
        parts.append(model(batch_of(config, range(n * PAIRS // count, (n + 1) * PAIRS // count))))
    total, terms = objective(grad_cache._join(parts) if count > 1 else parts[0], config.loss, step=0)
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return total.item(), {name: term.item() for name, term in terms.items()}, grads


def by_engine(config: Config, stage: Any) -> Result:
    """On each rank: its share of the batch through the real engine; whole gradients."""
    from deepspeed.utils import safe_get_full_grad

    import mama.train.deepspeed_engine as engine_module
    from mama.runtime.collectives import rank, world_size
    from mama.train.deepspeed_engine import is_plain, start_engine

    count = config.train.accumulation(world_size())
    size = config.train.micro_batch
    starts = [(n * world_size() + rank()) * size for n in range(count)]
    batches = [batch_of(config, range(start, start + size)) for start in starts]
    staged = replace(config, train=replace(config.train, zero_stage=stage, offload=stage == 3 and count > 1))
    settings = engine_module.deepspeed_settings(staged, world_size())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10  # else so small a model is left whole
    with patch.object(engine_module, "deepspeed_settings", lambda *_: settings):
        engine = start_engine(model_of(config), staged)
    if count > 1:
        total, terms, _ = grad_cache.backward(engine, batches, seed, config.loss, step=0)
    else:
        seed(0)
        total, terms = objective(engine(batches[0]), config.loss, step=0)
        engine.backward(total)
    grads = {
        n: (p.grad if is_plain(engine) else safe_get_full_grad(p))
        .detach()
        .clone()
        .view(getattr(p, "ds_shape", p.shape))
        for n, p in engine.module.named_parameters()
        if p.requires_grad
    }
    return total.item(), {name: term.item() for name, term in terms.items()}, grads


def by_stage(config: Config) -> list[tuple[str, Result]]:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results = [(f"stage {stage}", by_engine(config, stage)) for stage in (0, 1, 2, 3)]
    torch.distributed.destroy_process_group()
    return results


def assert_equal(found: Result, expected: Result, tolerance: float, where: str) -> None:
    assert found[0] == pytest.approx(expected[0], abs=tolerance), where
    assert found[1] == pytest.approx(expected[1], abs=tolerance), where
    assert found[2].keys() == expected[2].keys(), where
    for name, gradient in expected[2].items():
        if "k_proj.bias" not in name:  # softmax does not see it
            assert gradient.abs().max() > 0, name
        scale = max(1.0, float(gradient.abs().max()))
        # A batch norm takes away what a bias before it adds: the gradient is what rounding leaves of 0.
        rounding = re.search("batch|published", where) and re.search(IN_FRONT_OF_NORMS, name)
        close = 1e-4 if rounding else tolerance
        assert torch.allclose(found[2][name] / scale, gradient / scale, atol=close), f"{where}: {name}"


NORMS: tuple[Norm, ...] = ("layer", "batch", "published")


def with_norm(config: Config, norm: Norm) -> Config:
    """The published norms with the published negatives."""
    loss = replace(config.loss, negatives="published" if norm == "published" else "global")
    return replace(config, heads=replace(config.heads, norm=norm), loss=loss)


def by_norm(config: Config) -> list[tuple[str, Result]]:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results = [
        (f"{norm}, stage {stage}", by_engine(with_norm(config, norm), stage)) for norm in NORMS for stage in range(4)
    ]
    torch.distributed.destroy_process_group()
    return results


def by_halves(config: Config) -> Result:
    """In this process: two halves that meet in the view term alone; the loss of one, the mean of gradients."""
    model = model_of(config).train()
    halves = [model(batch_of(config, rows)) for rows in (range(PAIRS // 2), range(PAIRS // 2, PAIRS))]
    seen = [objective(half, replace(config.loss, negatives="local"), step=0)[1] for half in halves]
    _, together = objective(grad_cache._join(halves), replace(config.loss, negatives="global"), step=0)
    terms = [own | {"view": together["view"]} for own in seen]
    totals = [torch.stack(list(own.values())).sum() for own in terms]  # every term weighs 1
    torch.stack(totals).mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return totals[0].item(), {name: term.item() for name, term in terms[0].items()}, grads


def test_two_ranks_equal_one_rank_on_the_concatenated_batch() -> None:
    """Loss and every gradient, for every ZeRO stage; batch norms take the rows of both ranks, published ones do not."""
    config = tiny(2)
    whole = replace(config, train=replace(config.train, micro_batch=PAIRS))
    expected: dict[str, Result] = {norm: by_autograd(with_norm(whole, norm)) for norm in NORMS[:2]}
    expected["published"] = by_halves(with_norm(config, "published"))
    assert any("lora_A" in name for name in expected["layer"][2])
    for where, found in run_on_ranks(by_norm, config):
        norm, _, _ = where.partition(",")
        assert_equal(found, expected[norm], 1e-6 if norm == "layer" else 5e-6, where)


def clipped(config: Config) -> list[tuple[str, float, float, dict[str, torch.Tensor]]]:
    """By stage and largest norm: the norm that is logged, and Adam's first moments after one update."""
    from mama.runtime.collectives import rank
    from mama.train import zero_state
    from mama.train.deepspeed_engine import join_ranks, start_engine
    from mama.train.training_step import training_step

    def spoilt(*arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, terms = objective(*arguments)
        return total * (float("nan") if rank() == 1 else 1.0), terms

    join_ranks()
    size, found = config.train.micro_batch, []
    for stage in cast(Any, range(4)):
        for largest in (0.5, 1e6):
            optim, train = replace(config.optim, clip_norm=largest), replace(config.train, zero_stage=stage)
            engine = start_engine(model_of(config), replace(config, optim=optim, train=train))
            batch = batch_of(config, range(rank() * size, (rank() + 1) * size))
            assert training_step(engine, [batch], config, 0).taken
            moments = {
                key.partition("/")[2]: value.clone()
                for key, value in zero_state.tensors(engine)
                if key.startswith("exp_avg/")
            }
            found.append((f"stage {stage}", largest, float(engine.get_global_grad_norm()), moments))
            with patch("mama.train.training_step.objective", spoilt):
                assert not training_step(engine, [batch], config, 0).taken, "one rank's bad gradient is everyone's"
    torch.distributed.destroy_process_group()
    return found


def test_the_norm_is_that_of_all_gradients_and_clips_them_on_every_rank() -> None:
    """Ranks hold pieces of them, most of two tensors: compared with the whole batch in one process."""
    config = tiny(2)
    _, _, grads = by_autograd(replace(config, train=replace(config.train, micro_batch=PAIRS)))
    norm = float(torch.nn.utils.get_total_norm(list(grads.values())))
    assert norm > 1
    for stage, largest, logged, moments in run_on_ranks(clipped, config):
        where = f"{stage}, clip_norm {largest}"
        assert logged == pytest.approx(norm, rel=1e-5), where
        assert moments.keys() == grads.keys(), where
        factor = (1 - config.optim.betas[0]) * min(1.0, largest / norm)
        for name, gradient in grads.items():
            close = 1e-6 * factor * max(1.0, float(gradient.abs().max()))
            assert torch.allclose(moments[name], factor * gradient, atol=close, rtol=1e-4), f"{where}: {name}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_gradients_are_those_of_the_whole_batch(ranks: int) -> None:
    """Dropout is replayed: on one rank the micro-batches' masks are known, and the gradients are the same.

    On two ranks the logit scales are above their cap, and get the gradient that leads them back.
    """
    config = tiny(ranks, grad_cache=True, micro_batch=2)
    if ranks == 1:
        config = replace(config, text=replace(config.text, lora_dropout=0.3))
    else:
        config = replace(config, loss=replace(config.loss, initial_scale=40.0, max_scale=20.0))
    expected = by_autograd(config)
    assert expected[2]["scale.log"] > 0
    assert expected[2]["local_scale.log"] > 0
    for where, found in run_on_ranks(by_stage, config):
        assert_equal(found, expected, 1e-5, where)


class Scaled(torch.nn.Module):
    """A logit scale, and a matrix whose gradient is 0."""

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self.scale, self.head = LogitScale(loss.initial_scale, loss.max_scale), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale() + 0 * self.head(x).sum()


PUSHES = [-1.0] * 8 + [1.0] * 12  # the gradient of the loss by the scale: up, over its cap, and back
SCALES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def pushed(config: Config) -> list[list[float]]:
    """For each of `SCALES` the scale in front of every step, and behind the last."""
    from mama.train.deepspeed_engine import join_ranks, start_engine

    join_ranks()
    found = []
    for precision, stage in SCALES:
        train = replace(config.train, precision=cast(Any, precision), zero_stage=cast(Any, stage))
        engine = start_engine(cast(Any, Scaled(config.loss)), replace(config, train=train))
        x = torch.ones(1, 4, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        values = []
        for push in PUSHES:
            scale = engine(x)
            values.append(scale.item())
            engine.backward(push * scale)
            engine.step()
        found.append([*values, engine(x).item()])
    torch.distributed.destroy_process_group()
    return found


def pushed_by_hand(initial: float, largest: float, rate: float, bf16: bool) -> list[float]:
    """Adam (Kingma and Ba 2015, algorithm 1) on one number, whose gradient is 0 where it would lead away from a cap."""

    def rounded(x: float) -> float:
        return float(torch.tensor(x).bfloat16()) if bf16 else x

    log = rounded(math.log(initial))
    first = second = 0.0
    values = []
    for step, push in enumerate(PUSHES, 1):
        exact = math.exp(rounded(log))
        values.append(min(exact, largest))
        gradient = 0.0 if exact > largest and push < 0 else rounded(push * values[-1])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        log -= rate * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return [*values, min(math.exp(rounded(log)), largest)]


def test_a_logit_scale_that_was_pushed_over_its_cap_comes_back() -> None:
    """And it does not run away above it, where the way back would be longer with every step."""
    config = tiny(2)
    optim = replace(config.optim, lr=0.02, weight_decay=0.0)
    config = replace(config, loss=replace(config.loss, initial_scale=95.0), optim=optim)
    for where, found in zip(SCALES, run_on_ranks(pushed, config), strict=True):
        expected = pushed_by_hand(95.0, 100.0, 0.02, bf16=where[0] == "bf16")
        assert found == pytest.approx(expected, rel=1e-5), where
        assert found[8] == 100.0, where
        assert found[-1] < 99.0, where


def failing(config: Config) -> None:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    if os.environ["RANK"] == "1":
        raise ValueError("rank one has a problem")
    torch.distributed.barrier()


def test_a_dead_rank_ends_the_others_and_is_named() -> None:
    with pytest.raises(RankError, match=r"rank 1 failed.*rank one has a problem"):
        run_on_ranks(failing, tiny(2))


def killed(config: Config) -> None:
    """Rank 1 is gone, and rank 0, which notes signals instead of dying of them, computes on by itself."""
    from mama.runtime import preemption
    from mama.train.deepspeed_engine import join_ranks

    preemption.listen()
    join_ranks()
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_killed_rank_takes_the_job_down_within_a_minute() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 failed: .*Signal 9"):
        run_on_ranks(killed, tiny(2))
    assert time.monotonic() - start < 75  # with the start of the ranks; a hang would be five minutes
