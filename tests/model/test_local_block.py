"""The block that patches of the local term are read behind, against the hidden states of plain transformers models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from mama.model.mama_model import build
from mama.model.vision_tower import VisionTower, build_vision
from mama.objective.losses import objective
from mama.settings.schema import Tokens, VisionConfig
from tests.support.tiny_backbones import KERNEL, LAST_NORM, REGISTERS, VISION
from tests.support.tiny_model import batch_of, on_tissue, tiny
from tests.support.word_tokenizer import tokenizer

DEPTH = 3
CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("kind", list(VISION))
TOKENS = pytest.mark.parametrize("tokens", ["all", "tissue"])


def shape(kind: str) -> dict[str, Any]:
    return {**VISION[kind], "num_hidden_layers": DEPTH}


def towers(kind: str, tokens: Tokens, local_block: int | None) -> tuple[VisionTower, PreTrainedModel]:
    """A tower, and a plain model of the same weights; float64."""
    torch.manual_seed(0)
    tower = build_vision(VisionConfig(model=None, config=shape(kind), tokens=tokens, local_block=local_block), KERNEL)
    for name, parameter in tower.named_parameters():
        if parameter.ndim >= 2 or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    plain = AutoModel.from_config(AutoConfig.for_model(**shape(kind)), attn_implementation="sdpa")
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tower.state_dict().items()}
    for part in ("weight", "bias"):
        weights[f"{LAST_NORM[kind]}.{part}"] = weights.pop(f"norm.{part}")
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    return tower.double().eval(), plain.double().eval()


def images() -> Tensor:
    """Full of tissue, so that all patches are kept: one image after the other is what a plain model sees."""
    return normalise(torch.randint(9, 256, (2, 1, 48, 16), generator=torch.Generator().manual_seed(1))).double()


def wanted(kind: str, plain: PreTrainedModel, number: int) -> Tensor:
    """The patches [n, d] of its output `number`, 0 in front of the first block, behind the last norm."""
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    states = plain(pixel_values=images(), output_hidden_states=True, **more).hidden_states
    assert len(states) == DEPTH + 1
    prefix = 1 + (REGISTERS if kind in ("dinov2_with_registers", "dinov3_vit") else 0)
    return getattr(plain, LAST_NORM[kind])(states[number])[:, prefix:].flatten(0, 1)


@EVERY
@TOKENS
@pytest.mark.parametrize("local_block", [0, 1, 2, DEPTH, None])
def test_patches_are_the_normed_hidden_states_and_the_global_feature_is_the_same(
    kind: str, tokens: Tokens, local_block: int | None
) -> None:
    tower, plain = towers(kind, tokens, local_block)
    seen = tower(images())
    expected = wanted(kind, plain, DEPTH if local_block is None else local_block)
    torch.testing.assert_close(seen.patches, expected, atol=1e-6, rtol=1e-6)
    tower.local_block = None
    last = tower(images())
    assert torch.equal(seen.pooled, last.pooled)
    if local_block in (0, 1, 2):
        assert (seen.patches - last.patches).abs().max() > 1e-2


@EVERY
@TOKENS
@pytest.mark.parametrize("mode", ["plain", "checkpointed", "compiled and checkpointed"])
def test_gradients_reach_the_blocks_in_front_and_no_other(
    kind: str, tokens: Tokens, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_obstacle", lambda config, device: None)
    real = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda function: real(function, backend="aot_eager"))
    tower, plain = towers(kind, tokens, 1)
    train = replace(tiny(1).train, compile="compiled" in mode, activation_checkpointing="checkpointed" in mode)
    blocks.prepare_image_tower(tower, train, CPU)
    weights = torch.randn(12 * 2, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.manual_seed(3)  # DINOv3 draws its positions
    (tower.train()(images()).patches * weights).sum().backward()
    torch.manual_seed(3)
    (wanted(kind, plain.train(), 1) * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    reached = 0
    for name, parameter in tower.named_parameters():
        other = theirs[name.replace("norm.", f"{LAST_NORM[kind]}.") if name.startswith("norm.") else name[9:]]
        assert (parameter.grad is None) is (other.grad is None), name
        if (
            parameter.grad is not None and other.grad is not None and "k_proj.bias" not in name
        ):  # softmax does not see that bias
            scale = max(1.0, float(other.grad.abs().max()))
            torch.testing.assert_close(parameter.grad / scale, other.grad / scale, atol=1e-6, rtol=0, msg=name)
            reached += 1
    assert reached
    with_gradient = [any(p.grad is not None for p in block.parameters()) for block in blocks_of(tower)]
    assert with_gradient == [True, False, False]


@TOKENS
def test_reading_a_block_compiles_nothing_anew(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_obstacle", lambda config, device: None)
    real = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda function: real(function, backend="aot_eager"))
    graphs = []
    for local_block in (None, 1):
        config = tiny(1) if tokens == "all" else on_tissue(tiny(1))
        vision = replace(config.vision, config=config.vision.config | {"num_hidden_layers": 5}, local_block=local_block)
        config = replace(config, vision=vision)
        torch._dynamo.reset()
        counters.clear()
        model = build(config, tokenizer(), KERNEL)
        prepare_blocks(model, replace(config.train, compile=True), CPU)
        for start in range(3):
            objective(model(batch_of(config, range(start, start + 3))), config.loss, step=0)[0].backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("local_block", [-1, DEPTH + 1])
def test_a_block_that_is_not_there_is_refused(local_block: int) -> None:
    config = VisionConfig(model=None, config=shape("vit"), local_block=local_block)
    with pytest.raises(ConfigError, match=rf"^vision\.local_block: {local_block}, but the model has 3; name 0 to 3$"):
        build_vision(config, KERNEL)
