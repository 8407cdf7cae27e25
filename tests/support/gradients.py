"""Loss and gradients of one global batch by plain autograd and by the DeepSpeed engine, and their comparison."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mama.objective.losses import objective
from mama.settings.schema import Config
from mama.train import grad_cache
from tests.support.tiny_model import PAIRS, batch_of, model_of

IN_FRONT_OF_NORMS = r"(patch|sentence)_head\.[03]\.bias|view_head\.0\.bias"
# The loss, its terms by name, the gradients by parameter name.
Result = tuple[float, dict[str, float], dict[str, torch.Tensor]]


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
    from mama.train.deepspeed_engine import start_engine
    from mama.train.zero_state import is_plain

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


def assert_equal(found: Result, expected: Result, tolerance: float, where: str) -> None:
    """Loss and terms within `tolerance`, gradients within it times their largest value (at least 1)."""
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
