"""Two gloo ranks under the real DeepSpeed give the loss and the gradient of one rank on the whole batch."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from typing import Any, Literal, cast
from unittest.mock import patch

import pytest
import torch

from mama.errors import RankError
from mama.model.heads import LogitScale
from mama.objective.losses import objective
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, LossConfig, Norm, Tokens
from mama.train import grad_cache
from tests.support.gradients import Result, assert_equal, by_autograd, by_engine
from tests.support.tiny_model import PAIRS, batch_of, model_of, on_parts, on_tissue, tiny

pytestmark = pytest.mark.ranks


def by_stage(config: Config) -> list[tuple[str, Result]]:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results = [(f"stage {stage}", by_engine(config, stage)) for stage in (0, 1, 2, 3)]
    torch.distributed.destroy_process_group()
    return results


CASES: tuple[tuple[Norm, Tokens | Literal["parts"]], ...] = (
    ("layer", "all"), ("batch", "all"), ("published", "all"), ("layer", "tissue"), ("batch", "tissue"),
    ("layer", "parts"), ("batch", "parts"),
)  # fmt: skip


def with_norm(config: Config, norm: Norm) -> Config:
    """The published norms with the published negatives."""
    loss = replace(config.loss, negatives="published" if norm == "published" else "global")
    return replace(config, heads=replace(config.heads, norm=norm), loss=loss)


def on_patches(config: Config, norm: Norm, tokens: str) -> Config:
    """With patches of tissue alone, of which ranks differ in number, or with all; or other parts of the local term."""
    if tokens == "parts":
        config = on_parts(config, "alone" if norm == "batch" else "separator")
    elif tokens == "tissue":
        config = on_tissue(config)
    return with_norm(config, norm)


def padded(config: Config) -> Config:
    """A row for each text, in place of one for all of them, gives the same."""
    return replace(config, text=replace(config.text, packing=False))


def by_norm(config: Config) -> list[tuple[str, Result]]:
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results = [
        (f"{norm}, {tokens}, stage {stage}", by_engine(on_patches(config, norm, tokens), stage))
        for norm, tokens in CASES
        for stage in range(4)
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
    whole = padded(replace(config, train=replace(config.train, micro_batch=PAIRS)))
    expected: dict[tuple[str, str], Result] = {
        case: by_halves(with_norm(padded(config), "published"))
        if "published" in case
        else by_autograd(on_patches(whole, *case))
        for case in CASES
    }
    assert any("lora_A" in name for name in expected["layer", "all"][2])
    for where, found in run_on_ranks(by_norm, config):
        norm, tokens, _ = where.split(", ")
        assert_equal(found, expected[norm, tokens], 1e-6 if norm == "layer" else 5e-6, where)


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

    There micro-batches differ in their patches too. On two ranks so do sentences that tell findings, which some
    micro-batches have none of, and the logit scales are above their cap, and get the gradient that leads them back.
    """
    config = tiny(ranks, grad_cache=True, micro_batch=2)
    if ranks == 1:
        config = on_tissue(replace(config, text=replace(config.text, lora_dropout=0.3)))
    else:
        config = on_parts(replace(config, loss=replace(config.loss, initial_scale=40.0, max_scale=20.0)))
    expected = by_autograd(config if ranks == 1 else padded(config))  # each has its own masks of dropout
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

    preemption.record_signals()
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
