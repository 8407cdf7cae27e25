"""Learning rates by layer against an independent formula, and what is trained at all."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from mama.finetune.optimizer import layer_groups, optimizer_of, set_layer_rates
from mama.model.classifier import Classifier
from mama.settings.rates import rate_at
from mama.settings.schema import Config, FinetuneConfig, OptimConfig
from tests.support.tiny_model import model_of, tiny


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier(model_of(tiny(1)).vision, 3)


def config_of(**own: object) -> Config:
    base = tiny(1)
    optim = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=1, weight_decay=0.05)
    return replace(base, optim=optim, finetune=FinetuneConfig(**own))  # type: ignore[arg-type]


def test_every_layer_has_the_rate_of_the_one_above_times_the_decay(model: Classifier) -> None:
    """As Clark et al. 2020 (ELECTRA) write it: lr x decay^(layers above), here with 2 blocks, by parameter name."""
    config = config_of(layer_decay=0.5)
    groups = layer_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for step in (0, 1, 3):
        found = set_layer_rates(groups, step, config)
        top = rate_at(step, config.train.steps, config.optim)
        assert found == {"lr/highest": top, "lr/lowest": pytest.approx(top / 8)}
        for group in groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                block = re.search(r"\.layers?\.(\d+)\.", name)
                above = 0 if name.startswith("head.") else 2 - int(block[1]) if block else 3
                assert group["lr"] == pytest.approx(top * 0.5**above), name
                assert group["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0.0), name
                seen.add(name)
    assert seen == {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision.norm.weight", "vision.norm.bias", "vision.backbone.embeddings.mask_token"}


def test_without_decay_there_is_one_rate(model: Classifier) -> None:
    config = config_of(layer_decay=1.0)
    assert len(set(set_layer_rates(layer_groups(model, 0.05), 0, config).values())) == 1


def test_the_optimizer_is_the_one_that_is_asked_for(model: Classifier) -> None:
    assert isinstance(optimizer_of(model, config_of()), torch.optim.AdamW)
    plain = optimizer_of(model, config_of(optimizer="sgd"))
    assert isinstance(plain, torch.optim.SGD)
    assert {group["momentum"] for group in plain.param_groups} == {0}
