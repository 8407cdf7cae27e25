"""A local term over patches with tissue, while the image tower computes all: against one image after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama.data import augment
from mama.model.mama_model import Embeddings, MamaModel
from mama.objective.losses import objective
from mama.settings.schema import Config, Norm
from tests.support.alignment_loop import loop
from tests.support.tiny_model import PAIRS, batch_of, model_of, on_tissue, tiny

PATCH = 4  # of `on_tissue`


def config_of(norm: Norm = "layer", **loss: Any) -> Config:
    config = on_tissue(tiny(1))
    vision, heads = replace(config.vision, tokens="all"), replace(config.heads, norm=norm)
    loss = {"local_patches": "tissue", "positives": "instance"} | loss
    return replace(config, vision=vision, heads=heads, loss=replace(config.loss, **loss))


def by_image(model: MamaModel, pixels: Tensor) -> list[tuple[list[int], Tensor]]:
    """Of each image [1, H, W] the numbers of its patches with tissue, and their features [n, d] among all others."""
    found = []
    for image in pixels:
        levels = torch.round((image[0] + 1) * 127.5)
        rows, columns = (range(0, side, PATCH) for side in levels.shape)
        tissue = [bool((levels[y : y + PATCH, x : x + PATCH] > 8).any()) for y in rows for x in columns]
        numbers = [n for n, own in enumerate(tissue) if own]
        found.append((numbers, model.vision(image[None]).patches[numbers]))
    assert len({len(numbers) for numbers, _ in found}) > 1
    assert all(0 < len(numbers) < 32 for numbers, _ in found)
    return found


def rows_of(model: MamaModel, features: Tensor) -> Tensor:
    return F.normalize(cast(nn.Module, model.patch_head)(features), dim=-1)


def test_the_term_is_that_of_each_images_own_patches() -> None:
    config = config_of()
    model, batch = model_of(config), batch_of(config, range(PAIRS))
    e: Embeddings = model(batch)
    pixels = augment.apply(batch.anchors, batch.anchor_changes)
    own = [rows_of(model, features) for _, features in by_image(model, pixels)]
    assert e.sentences is not None
    assert e.sentence_mask is not None
    columns = [loop(e.sentences, e.sentence_mask, patches[None]) for patches in own]
    visual, textual = (torch.cat(side, 1) for side in zip(*columns, strict=True))
    identity = torch.arange(PAIRS)
    losses = [
        F.cross_entropy(e.local_scale * scores, identity) for side in (visual, textual) for scores in (side, side.t())
    ]
    wanted = torch.stack(losses).mean()
    found = objective(e, config.loss, step=0)[1]["local"]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    mine, theirs = (
        torch.autograd.grad(total, [p for p in model.vision.parameters() if p.requires_grad], retain_graph=True)
        for total in (found, wanted)
    )
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_all_else_is_as_with_all_patches() -> None:
    config = config_of()
    batch = batch_of(config, range(PAIRS))
    other = replace(config, loss=replace(config.loss, local_patches="all"))
    _, mine = objective(model_of(config)(batch), config.loss, step=0)
    _, theirs = objective(model_of(other)(batch), other.loss, step=0)
    for name in ("view", "anchor_text", "partner_text"):
        assert mine[name] == theirs[name]
    assert (mine["local"] - theirs["local"]).abs() > 1e-4


@pytest.mark.parametrize("norm", ["batch", "published"])
def test_batch_norms_see_patches_with_tissue_alone(norm: Any) -> None:
    config = config_of(norm)
    model, batch = model_of(config).train(), batch_of(config, range(PAIRS))
    rows: list[Tensor] = []
    cast(nn.Module, model.patch_head).register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    model(batch)
    seen = by_image(model, augment.apply(batch.anchors, batch.anchor_changes))
    torch.testing.assert_close(rows[0], torch.cat([features for _, features in seen]), atol=1e-6, rtol=1e-6)


def test_maps_have_no_value_elsewhere() -> None:
    config = config_of()
    model, batch = model_of(config).eval(), batch_of(config, range(PAIRS))
    pixels = augment.normalise(batch.anchors)
    with torch.no_grad():
        found = model.patch_embeddings(pixels)
        unit, features, again = model.embed_images_and_patches(pixels)
        for mine, plain in zip((unit, features), model.embed_images(pixels), strict=True):
            assert torch.equal(mine, plain)
        assert torch.equal(again.nan_to_num(7.0), found.nan_to_num(7.0))
        for row, (numbers, own) in zip(found, by_image(model, pixels), strict=True):
            assert (~row.isnan().any(1)).nonzero()[:, 0].tolist() == numbers
            torch.testing.assert_close(row[numbers], rows_of(model, own), atol=1e-6, rtol=1e-6)


def test_nothing_changes_where_the_tower_computes_tissue_alone() -> None:
    config = on_tissue(tiny(1))
    other = replace(config, loss=replace(config.loss, local_patches="tissue"))
    batch = batch_of(config, range(PAIRS))
    mine, theirs = (objective(model_of(one)(batch), one.loss, step=0)[0] for one in (config, other))
    assert mine == theirs


def test_a_model_without_the_term_does_not_look_for_tissue(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(local=0.0)
    monkeypatch.setattr("mama.model.tissue.kept_patches", None)
    model_of(config)(batch_of(config, range(2)))
