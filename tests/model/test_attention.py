"""The attention of both towers against a softmax in float64 and against transformers' own "eager" towers."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, PreTrainedModel

from mama.errors import ConfigError
from mama.model import attention
from mama.model.packing import Packing
from mama.settings.schema import Config, TextConfig

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "dinov2": {
        "model_type": "dinov2_with_registers", "num_channels": 1, "image_size": 32, "patch_size": 8,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2,
    },
    "dinov2_plain": {
        "model_type": "dinov2", "num_channels": 1, "image_size": 32, "patch_size": 8,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2,
    },
    "vit": {
        "model_type": "vit", "num_channels": 1, "image_size": 32, "patch_size": 8,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    },
    "dinov3": {
        "model_type": "dinov3_vit", "num_channels": 1, "image_size": 32, "patch_size": 8, "num_register_tokens": 2,
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
        "pos_embed_rescale": None,
    },
    "bert": {
        "model_type": "bert", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 32, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip


class Layer(nn.Module):
    """What a kernel may ask of the layer that calls it."""

    def __init__(self, causal: bool, groups: int) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Head by head in float64: [B, H, L, d] -> [B, L, H, d]; `bias` [B, H, L, K] is added to the scores."""
    batch, heads, length, _ = query.shape
    share = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            scores = scale * query[b, h].double() @ key[b, h // share].double().T
            if bias is not None:
                scores = scores + bias[b, h].double()
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out[b, :, h] = weights @ value[b, h // share].double()
    return out


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None
) -> Tensor:
    """The contract of xformers' function, whose kernels need CUDA: tensors are [B, L, H, d]."""
    from xformers.ops import LowerTriangularMask
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    batch, length, heads, width = query.shape
    assert key.shape == value.shape == (batch, key.shape[1], heads, width)  # its backward knows no grouped heads
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert p == 0.0
    shape = (batch, heads, length, key.shape[1])
    scores = torch.einsum("blhd,bkhd->bhlk", query.double(), key.double())
    scores = scores * (width**-0.5 if scale is None else scale)
    if isinstance(attn_bias, LowerTriangularMask | BlockDiagonalMask):
        scores = scores + attn_bias.materialize(shape, dtype=torch.float64)
    elif attn_bias is not None:
        assert attn_bias.shape == shape  # it does not broadcast
        assert attn_bias.dtype == query.dtype
        assert attn_bias.stride(-1) == 1  # its kernels read aligned rows
        assert all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        scores = scores + attn_bias.double()
    return torch.einsum("bhlk,bkhd->blhd", scores.softmax(-1), value.double()).to(query.dtype)


@pytest.fixture(params=["sdpa", "xformers"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel; xformers' own function is replaced, what is built around it is tested."""
    if request.param == "xformers":
        ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
        monkeypatch.setattr(ops, "memory_efficient_attention", memory_efficient_attention)
    return str(request.param)


def function_of(kernel: str) -> Callable[..., tuple[Tensor, None]]:
    return {"sdpa": attention.sdpa, "xformers": attention.xformers}[kernel]


def drawn(heads: int, groups: int, length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [2, H, L, 8], and key and value [2, H / groups, K, 8]."""
    torch.manual_seed(0)
    small = heads // groups
    return torch.randn(2, heads, length, 8), torch.randn(2, small, keys, 8), torch.randn(2, small, keys, 8)


def causal_bias(length: int) -> Tensor:
    """[L, L]: 0 up to the diagonal and minus infinity behind it."""
    return torch.full((length, length), float("-inf")).triu(1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scale", [8**-0.5, 0.7])
def test_without_a_mask_every_position_sees_all(kernel: str, groups: int, scale: float) -> None:
    query, key, value = drawn(6, groups, 5, 9)
    out, weights = function_of(kernel)(Layer(False, groups), query, key, value, None, scaling=scale)
    assert weights is None
    torch.testing.assert_close(out.double(), softmax_attention(query, key, value, None, scale), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("says", ["the layer", "the call"])
def test_a_causal_layer_sees_no_later_position(kernel: str, groups: int, says: str) -> None:
    query, key, value = drawn(6, groups, 7, 7)
    layer, argument = (Layer(True, groups), None) if says == "the layer" else (Layer(False, groups), True)
    out, _ = function_of(kernel)(layer, query, key, value, None, scaling=0.5, is_causal=argument)
    bias = causal_bias(7).expand(2, 6, 7, 7)
    torch.testing.assert_close(out.double(), softmax_attention(query, key, value, bias, 0.5), atol=1e-5, rtol=0)


def test_the_call_may_say_that_a_causal_layer_sees_all(kernel: str) -> None:
    query, key, value = drawn(2, 1, 6, 6)
    out, _ = function_of(kernel)(Layer(True, 1), query, key, value, None, scaling=0.5, is_causal=False)
    torch.testing.assert_close(out.double(), softmax_attention(query, key, value, None, 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_is_the_whole_pattern(kernel: str, kind: str, causal: bool) -> None:
    """Also in a causal layer: the causal pattern is then in the mask, and is not added a second time."""
    query, key, value = drawn(6, 3, 5, 5)
    visible = torch.rand(2, 1, 5, 5) < 0.5
    visible |= torch.eye(5, dtype=torch.bool)
    bias = torch.zeros(2, 1, 5, 5).masked_fill(~visible, float("-inf"))
    mask = visible if kind == "boolean" else bias.clamp(min=torch.finfo(torch.float32).min) + torch.randn(2, 1, 5, 5)
    expected = softmax_attention(query, key, value, (bias if kind == "boolean" else mask).expand(2, 6, 5, 5), 0.5)
    out, _ = function_of(kernel)(Layer(causal, 3), query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (1, 6, 5, 9), (2, 1, 1, 9), (2, 6, 5, 9)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_mask_is_broadcast(kernel: str, shape: tuple[int, ...], kind: str) -> None:
    """Over the batch, the heads and the queries."""
    query, key, value = drawn(6, 3, 5, 9)
    mask = torch.rand(shape) < 0.6 if kind == "boolean" else torch.randn(shape)
    if kind == "boolean":
        mask[..., 4] = True
        bias = torch.zeros(shape).masked_fill(~mask, float("-inf"))
    else:
        bias = mask
    expected = softmax_attention(query, key, value, bias.expand(2, 6, 5, 9), 0.5)
    out, _ = function_of(kernel)(Layer(False, 3), query, key, value, mask, scaling=0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_softmax(kernel: str) -> None:
    query, key, value = tensors = drawn(6, 3, 7, 7)
    for tensor in tensors:
        tensor.requires_grad_()
    weight = torch.randn(2, 7, 6, 8)
    out, _ = function_of(kernel)(Layer(True, 3), query, key, value, None, scaling=0.5)
    got = torch.autograd.grad((out * weight).sum(), tensors)
    bias = causal_bias(7).expand(2, 6, 7, 7)
    expected = torch.autograd.grad((softmax_attention(query, key, value, bias, 0.5) * weight).sum(), tensors)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [7], [1, 5, 1], [2, 3, 2], [4, 3]])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(kernel: str, lengths: list[int], groups: int, causal: bool) -> None:
    """Against one softmax over the whole row, with minus infinity between sequences; values and gradients."""
    count = sum(lengths)
    tensors = tuple(tensor[:1].requires_grad_() for tensor in drawn(6, groups, count, count))
    weight = torch.randn(1, count, 6, 8)
    out, _ = function_of(kernel)(Layer(causal, groups), *tensors, None, scaling=0.5, packing=Packing(lengths))
    number = torch.tensor([sequence for sequence, length in enumerate(lengths) for _ in range(length)])
    apart = torch.where(number[:, None] == number, 0.0, float("-inf"))
    bias = (apart + causal_bias(count) if causal else apart).expand(1, 6, count, count)
    query, key, value = tensors
    expected = softmax_attention(query, key, value, bias, 0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    got = torch.autograd.grad((out * weight).sum(), tensors)
    for one, other in zip(got, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_dropout_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = drawn(2, 1, 64, 64)
    out, _ = attention.sdpa(Layer(False, 1), query, key, torch.ones_like(value), None, dropout=0.5)
    assert out.std() > 0.01  # rows of weights that sum to 1 would give 1 everywhere
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ops, "memory_efficient_attention", lambda q, k, v, **given: asked.update(given) or q)
    attention.xformers(Layer(False, 1), query, key, value, None, scaling=0.3, dropout=0.25)
    assert asked == {"attn_bias": None, "p": 0.25, "scale": 0.3}


# Whole towers


def towers(shape: str, kernel: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights twice: with "eager" attention, and with ours."""
    torch.manual_seed(0)
    eager = AutoModel.from_config(AutoConfig.for_model(**SHAPES[shape]), attn_implementation="eager")
    for name, parameter in eager.named_parameters():
        if parameter.ndim >= 2 and "embeddings" not in name:  # larger weights, so that attention is far from uniform
            nn.init.normal_(parameter, std=0.3)
    ours = AutoModel.from_config(AutoConfig.for_model(**SHAPES[shape]), attn_implementation=attention.KERNELS[kernel])
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == attention.KERNELS[kernel]
    return eager, ours


def assert_same(eager: PreTrainedModel, ours: PreTrainedModel, expected: Tensor, got: Tensor) -> None:
    """The same states, and the same gradient of every parameter for a random direction of the states."""
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for states in (expected, got):
        (states * direction).sum().backward()
    for (name, one), other in zip(eager.named_parameters(), ours.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
            continue
        assert other.grad is not None, name
        scale = max(1.0, float(one.grad.abs().max()))
        torch.testing.assert_close(other.grad / scale, one.grad / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("shape", ["dinov2", "dinov2_plain", "vit", "dinov3"])
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_the_image_tower_equals_eager(kernel: str, shape: str, size: tuple[int, int]) -> None:
    eager, ours = towers(shape, kernel)
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(2))
    arguments = {"interpolate_pos_encoding": True} if shape == "vit" else {}
    expected, got = (tower(pixel_values=images, **arguments).last_hidden_state for tower in (eager, ours))
    assert_same(eager, ours, expected, got)


@pytest.mark.parametrize("lengths", [[9, 6, 3], [9, 9, 9]])
def test_a_bidirectional_text_tower_equals_eager_at_every_real_token(kernel: str, lengths: list[int]) -> None:
    eager, ours = towers("bert", kernel)
    tokens = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(3))
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = eager(input_ids=tokens, attention_mask=real.long()).last_hidden_state[real]
    got = ours(input_ids=tokens, attention_mask=real).last_hidden_state[real]
    assert_same(eager, ours, expected, got)
    with torch.no_grad():
        blind = ours(input_ids=tokens).last_hidden_state[real]
    assert bool((blind - got).abs().max() > 1e-3) is (min(lengths) < 9)  # the mask matters


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_text_tower_equals_eager_at_every_real_token(kernel: str, shape: str, masked: bool) -> None:
    """Padding is on the right: causal attention hides it with and without a mask."""
    eager, ours = towers(shape, kernel)
    tokens = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(3))
    real = torch.arange(9) < torch.tensor([9, 6, 3])[:, None]
    mask = real.long() if masked else None
    expected = eager(input_ids=tokens, attention_mask=real.long(), use_cache=False).last_hidden_state[real]
    got = ours(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state[real]
    assert_same(eager, ours, expected, got)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_no_token_sees_a_later_one(kernel: str, shape: str) -> None:
    _, ours = towers(shape, kernel)
    tokens = torch.arange(8)[None]
    other = tokens.clone()
    other[0, 5] = 20
    with torch.no_grad():
        one, two = (ours(input_ids=t, use_cache=False).last_hidden_state[0] for t in (tokens, other))
    torch.testing.assert_close(one[:5], two[:5], atol=1e-6, rtol=0)
    assert ((one[5:] - two[5:]).abs().amax(1) > 1e-3).all()


def test_a_mask_reaches_our_kernel(kernel: str) -> None:
    """Without a mask function of its name, transformers would drop the mask of a registered attention in silence."""
    eager, ours = towers("llama", kernel)
    tokens = torch.arange(8).expand(2, 8)
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])  # padding on the left, where causality does not hide it
    arguments = {"input_ids": tokens, "use_cache": False}
    with torch.no_grad():
        expected = eager(**arguments, attention_mask=left).last_hidden_state[left.bool()]
        got = ours(**arguments, attention_mask=left).last_hidden_state[left.bool()]
        blind = ours(**arguments).last_hidden_state[left.bool()]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert (blind - expected).abs().max() > 1e-3


# Choosing


@pytest.mark.parametrize(
    ("requested", "line"),
    [
        ("auto", "attention kernel: sdpa on cpu (xformers needs CUDA, the device is cpu)"),
        ("sdpa", "attention kernel: sdpa on cpu"),
    ],
)
def test_the_log_says_once_which_kernel_was_chosen(requested: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mama.model.attention"):
        assert attention.choose(requested, CPU) == "mama_sdpa"
    assert caplog.messages == [line]


class OnTheCpu(TorchFunctionMode):
    """A tensor that is asked for on a GPU is made on the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(given.get("device"), "type", None) == "cuda":
            given["device"] = CPU
        return function(*args, **given)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """One of compute capability 8.0, on which xformers' extension loads and its operators run."""
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    monkeypatch.setattr(ops, "memory_efficient_attention", memory_efficient_attention)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)
    with OnTheCpu():
        yield torch.device("cuda")


def assert_refused(gpu: torch.device, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """By `xformers` as an error, by `auto` in the log; in one line each."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mama.model.attention"):
        with pytest.raises(ConfigError) as error:
            attention.choose("xformers", gpu)
        assert str(error.value) == f"train.attention: xformers cannot run here ({reason}); use auto or sdpa"
        assert attention.choose("auto", gpu) == "mama_sdpa"
    assert caplog.messages == [f"attention kernel: sdpa on cuda ({reason})"]


def test_xformers_needs_cuda_and_its_package(
    gpu: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^train\.attention: xformers cannot run here .*CUDA.*; use auto or sdpa$"):
        attention.choose("xformers", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(gpu, "xformers is not installed: pip install xformers", caplog)


@pytest.mark.parametrize("packed", [False, True])
def test_xformers_is_tried_in_each_precision_with_each_mask_and_backwards(
    gpu: torch.device, packed: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformers import ops
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    tried = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, **options: Any) -> Tensor:
        out = memory_efficient_attention(query, key, value, attn_bias, **options)
        out.register_hook(lambda gradient: tried.append((query.dtype, type(attn_bias))))
        return out

    monkeypatch.setattr(ops, "memory_efficient_attention", recorded)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="mama.model.attention"), torch.inference_mode():
        assert attention.choose("auto", gpu, packed) == "mama_xformers"
    of = " of packed texts" if packed else ""
    assert caplog.messages == [f"attention kernel{of}: xformers on cuda"]
    masks: tuple[type, ...] = (type(None), ops.LowerTriangularMask, Tensor)
    if packed:
        masks = (type(None), BlockDiagonalMask, ops.LowerTriangularMask, BlockDiagonalCausalMask, Tensor)
    assert tried == [(dtype, mask) for dtype in (torch.float32, torch.bfloat16) for mask in masks]
    assert torch.equal(before, torch.get_rng_state())  # it changes nothing of the run


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("no operator\nbackwards")


@pytest.mark.parametrize("where", ["in bf16", "with a mask", "backwards"])
def test_an_operator_that_fails_at_one_place_is_found_before_the_run(
    gpu: torch.device, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformers import ops

    def failing(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, **options: Any) -> Tensor:
        if where == "in bf16" and query.dtype == torch.bfloat16:
            raise RuntimeError("no kernel image is available\nfor this device")
        if where == "with a mask" and isinstance(attn_bias, Tensor):
            raise ImportError("libx.so: missing")
        out = memory_efficient_attention(query, key, value, attn_bias, **options)
        return Broken.apply(out) if where == "backwards" else out

    monkeypatch.setattr(ops, "memory_efficient_attention", failing)
    reasons = {"in bf16": "no kernel image is available", "with a mask": "libx.so: missing", "backwards": "no operator"}
    assert_refused(gpu, reasons[where], caplog)


def test_what_xformers_says_of_its_operators_becomes_one_line(
    gpu: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own function, which has no operator for the CPU."""
    from xformers import ops
    from xformers.ops import fmha

    monkeypatch.setattr(ops, "memory_efficient_attention", fmha.memory_efficient_attention)
    with pytest.raises(
        ConfigError, match=r"^train\.attention: .*device=cpu \(supported: \{'cuda'\}\).*; use auto"
    ) as error:
        attention.choose("xformers", gpu)
    assert "\n" not in str(error.value)
    assert attention.choose("auto", gpu) == "mama_sdpa"


@pytest.mark.parametrize("capability", [(9, 0), (12, 0)])
def test_auto_takes_what_is_faster_on_newer_gpus(
    gpu: torch.device, capability: tuple[int, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.INFO, logger="mama.model.attention"):
        assert attention.choose("auto", gpu) == "mama_sdpa"
        assert attention.choose("xformers", gpu) == "mama_xformers"
    known = "compute capability {}.{}: from 9.0 on PyTorch has cuDNN's kernels".format(*capability)
    assert caplog.messages == [f"attention kernel: sdpa on cuda ({known})", "attention kernel: xformers on cuda"]


@pytest.mark.parametrize(("packing", "kernel"), [(True, "mama_xformers"), (False, "mama_sdpa")])
def test_the_text_tower_has_the_kernel_for_packed_texts(
    gpu: torch.device, packing: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = Config(text=TextConfig(packing=packing))
    assert attention.choose_both(config, gpu) == ("mama_sdpa", kernel)
    assert attention.choose_both(config, CPU) == ("mama_sdpa", "mama_sdpa")


MISSING = "libcudart.so.12: cannot open shared object file: No such file or directory"


@pytest.fixture
def linked_with_cuda_12(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """xformers' extension as the loader of a torch for CUDA 13 sees it; what has been loaded."""
    (tmp_path / "_C.so").touch()
    package = ModuleSpec("xformers", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    loaded: list[str] = []

    def load(path: str) -> None:
        if Path(path).name == "_C.so" and not any(Path(one).name == "libcudart.so.12" for one in loaded):
            raise OSError(MISSING)
        loaded.append(path)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(ctypes, "CDLL", load)
    return loaded


def test_the_runtime_of_cuda_12_is_taken_from_its_package(
    linked_with_cuda_12: list[str], gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, library = tmp_path / "nvidia_cuda_runtime_cu12-12.8.90.dist-info", "nvidia/cuda_runtime/lib/libcudart.so.12"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-runtime-cu12\nVersion: 12.8.90\n")
    (facts / "RECORD").write_text(f"nvidia/__init__.py,,0\n{library},,0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention.choose("auto", gpu) == "mama_xformers"
    assert linked_with_cuda_12 == [str(tmp_path / library), str(tmp_path / "_C.so")]


def test_a_missing_library_is_named_with_its_package(
    linked_with_cuda_12: list[str],
    gpu: torch.device,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_package(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", no_package)
    assert_refused(gpu, f"xformers' extension does not load, {MISSING}: pip install nvidia-cuda-runtime-cu12", caplog)
    assert linked_with_cuda_12 == []

    def other(path: str) -> None:
        raise OSError("_C.so: undefined symbol: _ZN3c10")

    monkeypatch.setattr(ctypes, "CDLL", other)
    fix = f"install the version of xformers that was built for PyTorch {torch.__version__}"
    assert_refused(gpu, f"xformers' extension does not load, _C.so: undefined symbol: _ZN3c10: {fix}", caplog)
