"""The image tower on tissue alone, against plain transformers models that see one image after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mama.data.augment import normalise
from mama.errors import ConfigError
from mama.model import blocks
from mama.model.backbones import blocks_of
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import MamaModel, build
from mama.model.vision_tower import VisionTower, build_vision
from mama.objective.losses import objective
from mama.settings.schema import Config, VisionConfig
from mama.train import grad_cache
from tests.support.tiny_backbones import KERNEL, LAST_NORM, REGISTERS, VISION
from tests.support.tiny_model import batch_of, model_of, on_tissue, tiny
from tests.support.word_tokenizer import tokenizer

CPU = torch.device("cpu")
PREFIX = {"dinov2_with_registers": 1 + REGISTERS, "dinov2": 1, "vit": 1, "dinov3_vit": 1 + REGISTERS}
PATCH = 8


def towers(kind: str, **shape: Any) -> tuple[VisionTower, PreTrainedModel]:
    """A tower on tissue, and a plain model with the same weights and attention written out; float64."""
    torch.manual_seed(0)
    settings = {**VISION[kind], **shape}
    tower = build_vision(VisionConfig(model=None, config=settings, tokens="tissue"), KERNEL)
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    plain = AutoModel.from_config(AutoConfig.for_model(**settings), attn_implementation="eager")
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tower.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"{LAST_NORM[kind]}.{part}"] = weights.pop(f"norm.{part}")
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    return tower.double().eval(), plain.double().eval()


def some_images(size: tuple[int, int], levels: dict[int, int]) -> Tensor:
    """uint8 [4, 1, H, W]: tissue in some patches, in a pixel of one patch, nowhere, everywhere; `levels`: the rest."""
    rng = np.random.default_rng(3)
    images = np.zeros((4, 1, *size), np.uint8)
    images[0, 0, :, 5 : size[1] // 2] = rng.integers(60, 256, (size[0], size[1] // 2 - 5))
    images[1, 0, size[0] - 1, size[1] - 1] = 9  # one grey level above the background
    images[3, 0] = rng.integers(9, 256, size)
    for number, level in levels.items():
        images[number][images[number] == 0] = level
    return torch.from_numpy(images)


def has_tissue(image: Tensor) -> list[bool]:
    """By hand, of uint8 [1, H, W]."""
    rows, columns = (range(0, side, PATCH) for side in image.shape[1:])
    found = [bool((image[0, y : y + PATCH, x : x + PATCH] > 8).any()) for y in rows for x in columns]
    return found if any(found) else [True] * len(found)


def alone(kind: str, plain: PreTrainedModel, image: Tensor, kept: list[bool]) -> tuple[Tensor, Tensor]:
    """[1, c, H, W] -> the mean over the tokens [d], and the `kept` patches behind the norm."""
    parts = cast(Any, plain)
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    tokens = parts.embeddings(image, **more)
    rows = [*range(PREFIX[kind]), *(PREFIX[kind] + place for place, own in enumerate(kept) if own)]
    tokens = tokens[:, rows]
    turns = {}
    if kind == "dinov3_vit":
        turns["position_embeddings"] = tuple(part[torch.tensor(kept)] for part in parts.rope_embeddings(image))
    for block in blocks_of(plain):
        tokens = block(tokens, **turns)
    norm = getattr(plain, LAST_NORM[kind])
    return tokens[0].mean(0), norm(tokens[0, PREFIX[kind] :])


def weighted(pooled: Tensor, patches: Tensor) -> Tensor:
    """A number to differentiate that depends on each feature by itself."""
    generator = torch.Generator().manual_seed(5)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (pooled, patches))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", list(VISION))
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_features_and_gradients_are_those_of_each_image_alone(kind: str, size: tuple[int, int]) -> None:
    tower, plain = towers(kind)
    levels = some_images(size, {0: 8, 1: 3})  # the background is not all black
    images = normalise(levels).double()
    kept = [has_tissue(image) for image in levels]
    counts = [sum(own) for own in kept]
    assert counts[1] == 1
    assert counts[2] == counts[3] == len(kept[0]) > counts[0] > 1
    seen = tower(images)
    expected = [alone(kind, plain, image[None], own) for image, own in zip(images, kept, strict=True)]
    pooled, patches = torch.stack([one for one, _ in expected]), torch.cat([own for _, own in expected])
    assert seen.kept is not None
    assert seen.kept.tolist() == kept
    assert seen.counts == counts
    close = 1e-5 if kind == "vit" else 1e-6  # its attention written out has the softmax in fp32
    torch.testing.assert_close(seen.pooled, pooled, atol=close, rtol=0)
    torch.testing.assert_close(seen.patches, patches, atol=close, rtol=0)
    weighted(seen.pooled, seen.patches).backward()
    weighted(pooled, patches).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in tower.named_parameters():
        other = theirs[name.replace("norm.", f"{LAST_NORM[kind]}.") if name.startswith("norm.") else name[9:]]
        if parameter.requires_grad and "k_proj.bias" not in name:  # softmax does not see that bias
            assert parameter.grad is not None, name
            assert other.grad is not None, name
            scale = max(1.0, float(other.grad.abs().max()))
            torch.testing.assert_close(parameter.grad / scale, other.grad / scale, atol=close, rtol=0, msg=name)


@pytest.mark.parametrize("kind", list(VISION))
def test_an_image_full_of_tissue_has_the_features_of_all_patches(kind: str) -> None:
    tower, _ = towers(kind)
    images = normalise(some_images((48, 16), {})).double()
    seen = tower(images)
    tower.only_tissue = False
    everything = tower(images)
    full = everything.patches.unflatten(0, (4, -1))
    mine = seen.patches.split(seen.counts)
    for number in (2, 3):  # one of them is empty, and keeps all
        torch.testing.assert_close(seen.pooled[number], everything.pooled[number], atol=1e-6, rtol=0)
        torch.testing.assert_close(mine[number], full[number], atol=1e-10, rtol=0)
    assert (seen.pooled[0] - everything.pooled[0]).abs().max() > 1e-3, "black patches are seen, if they are there"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tissue_begins_at_the_same_grey_level_in_every_precision(dtype: torch.dtype) -> None:
    tower, _ = towers("vit")
    levels = torch.arange(16, dtype=torch.uint8).repeat_interleave(PATCH).expand(1, 1, PATCH, -1)
    seen = tower.to(dtype)(normalise(levels).to(dtype))
    assert seen.kept is not None
    assert seen.kept[0].tolist() == [level > 8 for level in range(16)]


def test_dinov3_draws_its_positions_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tower, plain = towers("dinov3_vit", pos_embed_rescale=2.0)
    levels = some_images((32, 32), {})
    images = normalise(levels).double()
    torch.manual_seed(7)
    seen = tower.train()(images)
    torch.manual_seed(7)
    drawn = cast(Any, plain.train()).rope_embeddings(images)
    monkeypatch.setattr(cast(Any, plain).rope_embeddings, "forward", lambda _: drawn)  # once for all images
    pooled, _ = alone("dinov3_vit", plain, images[:1], has_tissue(levels[0]))
    torch.testing.assert_close(seen.pooled[0], pooled, atol=1e-6, rtol=0)
    assert (tower.eval()(images).pooled[0] - pooled).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit"])
def test_stochastic_depth_is_refused(kind: str) -> None:
    config = VisionConfig(model=None, config=VISION[kind] | {"drop_path_rate": 0.1})
    build_vision(config, KERNEL)
    with pytest.raises(ConfigError, match=r"^vision\.tokens: [^\n]*drop_path_rate 0\.1 [^\n]*tokens=all$"):
        build_vision(replace(config, tokens="tissue"), KERNEL)


def test_an_attention_that_would_mix_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^vision\.tokens: the attention eager [^\n]*$"):
        build_vision(VisionConfig(model=None, config=VISION["vit"], tokens="tissue"), "eager")


# The whole model


def gradients(model: MamaModel, config: Config, rows: range = range(6)) -> tuple[Tensor, dict[str, Tensor]]:
    total, _ = objective(model(batch_of(config, rows)), config.loss, step=0)
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], atol=1e-6, rtol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_embeddings_are_padded_to_the_image_with_most_patches() -> None:
    config = on_tissue(tiny(1))
    model = model_of(config).eval()
    batch = batch_of(config, range(8))
    with torch.no_grad():
        e = model(batch)
    assert e.patches is not None
    assert e.patch_mask is not None
    assert e.kept is not None
    counts = e.kept.sum(1)
    assert len(set(counts.tolist())) > 1
    assert e.patches.shape[:2] == e.patch_mask.shape == (8, int(counts.max()))
    assert e.patch_mask.sum(1).tolist() == counts.tolist()
    assert not e.patches[~e.patch_mask].any()
    norms = e.patches[e.patch_mask].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_patch_that_was_not_computed_has_no_embedding() -> None:
    config = on_tissue(tiny(1))
    model = model_of(config).eval()
    images = normalise(some_images((32, 16), {}))
    with torch.no_grad():
        found = model.patch_embeddings(images)
        seen = model.vision(images)
    assert found.shape == (4, 32, 16)
    assert seen.kept is not None
    assert torch.equal(found.isnan().any(2), ~seen.kept)
    torch.testing.assert_close(found[seen.kept].norm(dim=-1), torch.ones(sum(seen.counts)))
    rows = cast(nn.Module, model.patch_head)(seen.patches)
    torch.testing.assert_close(found[seen.kept], rows / rows.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("norm", ["batch", "published"])
def test_batch_norms_see_the_patches_that_are_kept(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = on_tissue(replace(tiny(1), heads=replace(tiny(1).heads, norm=norm)))
    model = model_of(config).train()
    rows: list[Tensor] = []
    cast(nn.Module, model.patch_head).register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    batch = batch_of(config, range(8))
    e = model(batch)
    assert e.patch_mask is not None
    assert len(rows[0]) == int(e.patch_mask.sum()) < e.patch_mask.numel()


@pytest.mark.parametrize("kind", list(VISION))
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    config = on_tissue(replace(tiny(1), vision=VisionConfig(model=None, config=VISION[kind])))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # DINOv3 draws positions
        model = build(config, tokenizer(), KERNEL)
        prepare_blocks(model, replace(config.train, activation_checkpointing=checkpointing), CPU)
        torch.manual_seed(1)
        found.append(gradients(model, config))
    require_equal(*found)


def test_micro_batches_that_are_joined_are_one_batch() -> None:
    config = on_tissue(tiny(1))
    model = model_of(config)
    parts = [model(batch_of(config, rows)) for rows in (range(3), range(3, 6))]
    assert len({part.patches.shape[1] for part in parts}) == 2
    total, _ = objective(grad_cache._join(parts), config.loss, step=0)
    total.backward()
    found = total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    require_equal(found, gradients(model_of(config), config))


def test_compiled_blocks_serve_rows_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's stand-in for kernels; the second length makes it compile for all, which serve all blocks."""
    config = on_tissue(tiny(1))
    shape = config.vision.config | {"num_hidden_layers": 10}
    config = replace(config, vision=replace(config.vision, config=shape))
    monkeypatch.setattr(blocks, "_obstacle", lambda config, device: None)
    real = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda function: real(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled, plain = build(config, tokenizer(), KERNEL), build(config, tokenizer(), KERNEL)
    prepare_blocks(compiled, replace(config.train, compile=True), CPU)
    prepare_blocks(plain, config.train, CPU)
    graphs = []
    for start in range(5):
        rows = range(start, start + 3)
        require_equal(gradients(compiled, config, rows), gradients(plain, config, rows))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0], *[2 * graphs[0]] * 4]
    torch._dynamo.reset()
