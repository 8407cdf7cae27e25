"""The learning rate against hand values, and what AdamW moves and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mama.model.heads import LocalHead, LogitScale
from mama.settings.rates import rate_at
from mama.settings.schema import LossConfig, OptimConfig
from mama.train.optimizer import parameter_groups, set_rates

OPTIM = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)


class Towers(nn.Module):
    """One matrix of each tower and of a head, and the norm that the local term alone moves."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Module(), nn.Module()
        self.vision.block, self.vision.norm = nn.Linear(2, 2, bias=False), nn.LayerNorm(2)
        self.text.block, self.image_head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


class Small(nn.Module):
    """The names that the groups go by, on a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.image_head = nn.Linear(3, 4)
        self.patch_head = LocalHead(3, 5, 4)
        self.sentence_head = LocalHead(3, 5, 4)
        self.scale = LogitScale(1 / 0.07, 100.0)
        self.local_scale = LogitScale(1 / 0.07, 100.0)

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A global and a local term that depend on all trainable parameters of their kind."""
        x = self.tower(torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7]]))
        local = (self.patch_head(x)[:, 0] * self.sentence_head(x)[:, 1]).sum() * self.local_scale()
        return self.image_head(x).square().sum() * self.scale(), local


def is_local(name: str) -> bool:
    return name.split(".")[0] in ("patch_head", "sentence_head", "local_scale")


def test_the_warm_up_is_linear_and_reaches_the_rate_with_its_last_step() -> None:
    assert [rate_at(step, 13, OPTIM) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rate_at(0, 13, OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0)) == 1.0


def test_the_rate_falls_by_a_cosine_between_its_two_ends() -> None:
    """Half way in time is half way in rate; a cosine is flat at both ends and never rises."""
    rates = [rate_at(step, 1004, OPTIM) for step in range(4, 1004)]
    assert rates[500] == pytest.approx(0.55, abs=2e-3)
    assert rates[250] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, abs=2e-3)
    assert rates[750] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2, abs=2e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] - rates[10] < 1e-3
    assert rates[-11] - rates[-1] < 1e-3


@pytest.mark.parametrize(("steps", "warmup"), [(13, 4), (400, 40), (3, 1), (40000, 4000)])
def test_the_last_step_has_the_smallest_rate(steps: int, warmup: int) -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup)
    assert rate_at(steps - 1, steps, optim) == pytest.approx(0.1, abs=1e-12)


def test_a_run_that_is_all_warm_up_has_a_rate_at_every_step() -> None:
    assert [rate_at(step, 3, OPTIM) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])
    assert 0.1 <= rate_at(4, 5, OPTIM) <= 1.0


def test_norms_biases_and_scales_do_not_decay_and_nothing_frozen_is_in_a_group() -> None:
    model = Small()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.3)
    found: dict[str, tuple[float, bool]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["weight_decay"], group["term"] == "local"
    matrices = {"tower.0.weight", "image_head.weight"}
    matrices |= {f"{head}.{layer}.weight" for head in ("patch_head", "sentence_head") for layer in (0, 3)}
    assert found == {
        name: (0.3 if name in matrices else 0.0, is_local(name)) for name in names.values() if "frozen" not in name
    }
    assert len(groups) == 4


def step_once(model: Small, optimizer: torch.optim.Optimizer, step: int, loss: LossConfig) -> dict[str, bool]:
    """One step as training takes it; which parameters moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_rates(optimizer.param_groups, step, 100, OptimConfig(lr=1e-3, warmup_steps=0), loss)
    optimizer.zero_grad()
    together, local = model.terms()
    (together + (local if step >= loss.local_start else 0.0 * local)).backward()
    optimizer.step()
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}


def test_local_heads_do_not_move_before_their_term_starts_and_move_after() -> None:
    model, loss = Small(), LossConfig(local_start=3)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=1e-3)
    for step in range(6):
        moved = step_once(model, optimizer, step, loss)
        for name, did in moved.items():
            wanted = not name.startswith("frozen") and (step >= 3 or not is_local(name))
            assert did is wanted, f"{name} at step {step}"


def test_every_group_gets_the_rate_of_its_tower_and_of_the_step() -> None:
    groups: list[dict[str, Any]] = parameter_groups(Towers(), 0.1)
    loss, optim = LossConfig(local_start=2), replace(OPTIM, vision_rate=0.5, text_rate=2.0)
    assert set_rates(groups, 1, 13, optim, loss) == {"vision": 0.25, "text": 1.0, "heads": 0.5}
    rates = {("vision", None, 0.25), ("text", None, 1.0), ("heads", None, 0.5)}
    assert {(g["tower"], g["term"], g["lr"]) for g in groups} == rates | {("vision", "local", 0.0)}
    set_rates(groups, 2, 13, optim, loss)
    assert {g["lr"] for g in groups if g["term"] == "local"} == {0.375}


def test_without_a_delay_local_heads_move_from_the_first_step() -> None:
    model = Small()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=1e-3)
    moved = step_once(model, optimizer, 0, LossConfig(local_start=0))
    assert all(did for name, did in moved.items() if is_local(name))
