"""Recipes of the paper, its baselines and ablations, scaled down: each computes its terms and trains its parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mama.objective.losses import objective
from mama.settings.load import load, shipped_configs
from mama.settings.schema import Config
from mama.train.optimizer import parameter_groups
from tests.support.tiny_model import batch_of, model_of, tiny

ALL = {"view", "anchor_text", "partner_text", "local"}
TERMS = {
    "mama": ALL,
    "mama_published_code": ALL,
    "clip": {"anchor_text"},
    "slip": {"view", "anchor_text"},
    "convirt": {"anchor_text"},
    "ablations/no_multi_view": {"anchor_text", "local"},
    "ablations/no_sla": {"view", "anchor_text", "partner_text"},
    **{f"ablations/{name}": ALL for name in ("one_sided_sla", "frozen_text", "full_text", "no_masking")},
    **{f"ablations/{name}": ALL for name in ("text_sentence", "text_caption")},
}


def small(recipe: Config) -> Config:
    """The towers and sizes of the tests, everything else as the recipe has it."""
    base = tiny(1)
    heads = replace(base.heads, norm=recipe.heads.norm)
    text = replace(base.text, tune=recipe.text.tune)
    vision = replace(base.vision, freeze_norm=recipe.vision.freeze_norm)
    return replace(recipe, data=base.data, vision=vision, text=text, heads=heads, train=base.train, seed=1)


def test_every_recipe_is_here() -> None:
    ablations = {f"ablations/{path.stem}" for path in (shipped_configs() / "ablations").glob("*.yaml")}
    assert ablations == {name for name in TERMS if name.startswith("ablations/")}


@pytest.mark.parametrize("name", TERMS)
def test_a_recipe_computes_its_terms_and_every_trained_tensor_has_a_gradient(name: str) -> None:
    config = small(load(name))
    model = model_of(config).train()
    total, terms = objective(model(batch_of(config, range(8))), config.loss, step=40_000)
    assert set(terms) == TERMS[name]
    assert total.isfinite()
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    adapted = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("text.backbone")}
    trained = any("trainable_tokens" not in name for name in adapted)
    assert trained is (config.text.tune != "frozen")


def test_the_published_code_weighs_and_delays_as_it_does() -> None:
    """Its total is L_VV + 2 L_VT(v, t) + 2 L_VT(w, t) + 4 L_local, and before step 8,000 only the second term."""
    config = small(load("mama_published_code"))
    model = model_of(config).train()
    torch.manual_seed(0)
    late, terms = objective(model(batch_of(config, range(8))), config.loss, step=8_000)
    expected = terms["view"] + 2 * terms["anchor_text"] + 2 * terms["partner_text"] + 4 * terms["local"]
    assert late.item() == pytest.approx(expected.item(), rel=1e-6)
    early, terms = objective(model(batch_of(config, range(8))), config.loss, step=7_999)
    assert early.item() == pytest.approx(2 * terms["anchor_text"].item(), rel=1e-6)


def test_the_published_code_decays_everything_clips_nothing_and_keeps_a_norm() -> None:
    """As its optimizer is given all parameters, and its image tower's last norm takes no gradient."""
    recipe = load("mama_published_code")
    assert (recipe.optim.clip_norm, recipe.heads.norm, recipe.loss.negatives) == (0.0, "published", "published")
    assert recipe.data.require == ["density", "birads", "reason"]
    model = model_of(small(recipe))
    groups = parameter_groups(model, recipe.optim.weight_decay, recipe.optim.decay)
    assert {group["weight_decay"] for group in groups} == {0.1}
    trained = {id(p) for group in groups for p in group["params"]}
    assert {name for name, p in model.vision.named_parameters() if id(p) not in trained and p.numel()} == {
        "norm.weight", "norm.bias", "backbone.embeddings.mask_token",
    }  # fmt: skip
    assert id(model.scale.log) in trained


def test_slip_pulls_two_augmentations_together_at_the_temperature_of_its_paper() -> None:
    """Mu et al. 2022: 0.1, a hidden layer of 4,096 and BatchNorm over all ranks in the head."""
    recipe = load("slip")
    assert (recipe.loss.view_temperature, recipe.heads.view_hidden_dim, recipe.heads.norm) == (0.1, 4096, "batch")
    assert (recipe.loss.view, recipe.loss.anchor_text, recipe.data.pairs) == (1.0, 1.0, ["augment"])
