"""The image tower against plain vision transformers of the same weights."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mama.errors import ConfigError
from mama.model.vision_tower import PatchProjection, VisionTower, build_vision
from mama.settings.schema import VisionConfig
from tests.support.tiny_backbones import KERNEL, LAST_NORM, REGISTERS, VISION

PREFIX = {"dinov2_with_registers": 1 + REGISTERS, "dinov2": 1, "vit": 1, "dinov3_vit": 1 + REGISTERS}
VISIONS = pytest.mark.parametrize("kind", list(VISION))


def vision_tower(kind: str, **shape: Any) -> tuple[VisionTower, PreTrainedModel]:
    """The tower, and a plain model of the same weights; no register or position is zero."""
    torch.manual_seed(0)
    tower = build_vision(VisionConfig(model=None, config={**VISION[kind], **shape}), KERNEL).eval()
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    plain = AutoModel.from_config(AutoConfig.for_model(**{**VISION[kind], **shape}), attn_implementation="eager").eval()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tower.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"{LAST_NORM[kind]}.{part}"] = weights.pop(f"norm.{part}")
    result = plain.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("pooler.") for name in result.missing_keys)
    return tower, plain


def plain_states(kind: str, plain: PreTrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """All token states of a plain model, [b, L, d], in front of its last norm and behind it."""
    before: list[Tensor] = []
    norm = cast(nn.Module, getattr(plain, LAST_NORM[kind]))
    hook = norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    arguments = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        after = plain(pixel_values=images, **arguments).last_hidden_state
    hook.remove()
    return before[0], after


@VISIONS
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (16, 24), (64, 64)])
def test_global_and_patch_features_are_those_of_the_plain_model(kind: str, size: tuple[int, int]) -> None:
    tower, plain = vision_tower(kind)
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        seen = tower(images)
    feature, patches = seen.pooled, seen.patches.unflatten(0, (2, -1))
    before, after = plain_states(kind, plain, images)
    count = size[0] * size[1] // 64
    assert before.shape == (2, PREFIX[kind] + count, 24)
    assert patches.shape == (2, count, 24)
    assert (seen.counts, seen.kept) == ([count] * 2, None)
    torch.testing.assert_close(feature, before.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches, after[:, PREFIX[kind] :], atol=1e-5, rtol=0)
    assert (before.mean(1) - after.mean(1)).abs().max() > 0.1  # before and after the norm differ


@VISIONS
def test_patches_stand_in_row_major_order(kind: str) -> None:
    """With no attention block left, a patch's feature depends on its own pixels alone."""
    tower, _ = vision_tower(kind, num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)  # 6 rows of 2 patches
    changed = images.clone()
    changed[0, 0, 3 * 8 + 2, 8 + 5] = 1.0  # row 3, column 1
    with torch.no_grad():
        difference = (tower(changed).patches - tower(images).patches).abs().amax(1)
    assert difference.nonzero().flatten().tolist() == [3 * 2 + 1]


@pytest.mark.parametrize(("kind", "smooth"), [("dinov2_with_registers", True), ("dinov2", False), ("vit", False)])
def test_a_rectangular_image_has_its_positions_interpolated(kind: str, smooth: bool) -> None:
    tower, _ = vision_tower(kind, num_hidden_layers=0)
    images = torch.zeros(1, 1, 48, 16)
    embeddings = cast(Any, tower.backbone).embeddings
    table = embeddings.position_embeddings[0, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(6, 2), mode="bicubic", align_corners=False, antialias=smooth)
    expected = resized.flatten(2).transpose(1, 2) + embeddings.patch_embeddings.projection.bias
    with torch.no_grad():
        patches = tower(images).patches
        torch.testing.assert_close(patches, tower.norm(expected)[0], atol=1e-5, rtol=0)


def test_dinov3_knows_where_a_patch_is() -> None:
    """It has no table of positions: the attention turns with them. Equal patches at other places see other things."""
    tower, _ = vision_tower("dinov3_vit")
    images = torch.zeros(1, 1, 48, 16)
    images[0, 0, :8, :8] = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        patches = tower(images).patches
    distances = (patches[3] - patches[5:]).abs().amax(1)  # black patches, all but the first
    assert distances.min() > 1e-3


def test_dinov3_trains_after_it_has_embedded_the_same_size() -> None:
    """transformers keeps the coordinates of patches; made in inference mode, they must do for training."""
    tower = vision_tower("dinov3_vit", pos_embed_rescale=None)[0]
    images = torch.rand(1, 1, 40, 56)
    with torch.inference_mode():
        expected = tower(images).pooled.clone()
    got = tower.train()(images).pooled
    got.sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_grey_images_reach_every_channel() -> None:
    tower, plain = vision_tower("dinov2_with_registers", num_channels=3)
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        patches = tower(images).patches.unflatten(0, (2, -1))
        expected = plain(pixel_values=images.repeat(1, 3, 1, 1)).last_hidden_state[:, 1 + REGISTERS :]
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)


@VISIONS
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_everything_in_the_image_tower_is_trained(kind: str, size: tuple[int, int]) -> None:
    tower = vision_tower(kind)[0].train()
    seen = tower(torch.rand(2, 1, *size))
    (seen.pooled[:, 0].sum() + (seen.patches * torch.randn(seen.patches.shape)).sum()).backward()
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name  # softmax does not see that bias
        else:
            assert name.endswith("mask_token")


@VISIONS
def test_the_last_norm_alone_serves_the_patches_alone(kind: str) -> None:
    """Which is what the groups of the optimizer rest on: `norm.` is moved by the local term and no other."""
    tower = vision_tower(kind)[0]
    tower(torch.rand(2, 1, 32, 32)).pooled.square().sum().backward()
    without = {name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {"norm.weight", "norm.bias"}


def test_no_registers_leave_no_empty_parameter_to_train() -> None:
    tower = vision_tower("dinov3_vit", num_register_tokens=0)[0]
    assert tower(torch.zeros(1, 1, 32, 16)).patches.shape == (8, 24)
    assert all(p.numel() for p in tower.parameters()), "ZeRO-3 knows none without an element"
    named = {name: tensor for name, tensor in tower.state_dict().items() if not tensor.numel()}
    assert list(named) == ["backbone.embeddings.register_tokens"], (
        "files of the weights have the same tensors as before"
    )
    tower.bfloat16()
    assert tower(torch.zeros(1, 1, 32, 16, dtype=torch.bfloat16)).pooled.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_sides_that_differ_in_the_architecture_are_refused_in_one_line(name: str) -> None:
    shape = {**VISION["vit"], name: [16, 8]}
    with pytest.raises(ConfigError, match=rf"^vision\.config: {name} is [^\n]*16, 8[^\n]* one number of pixels$"):
        build_vision(VisionConfig(model=None, config=shape), KERNEL)


def test_an_unknown_image_architecture_is_refused_in_one_line() -> None:
    shape = {
        "model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32,
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^vision: clip_vision_model is not one of dinov2, dinov2_with_registers, vit, dinov3_vit$"
    ):
        build_vision(VisionConfig(model=None, config=shape), KERNEL)


def test_patches_become_tokens_by_one_matrix_product_as_by_the_convolution() -> None:
    """What a GPU runs, in the arithmetic of the CPU; patches and images that are no squares."""
    convolution = nn.Conv2d(3, 8, (14, 7), stride=(14, 7))
    images = torch.randn(2, 1, 28, 35).expand(-1, 3, -1, -1)
    wanted = convolution(images)
    convolution.__class__ = PatchProjection
    with mock.patch.object(Tensor, "is_cuda", True):
        got = convolution(images)
    assert got.shape == (2, 8, 2, 5)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
