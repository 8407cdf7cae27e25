"""What only a CUDA device can show; all of it is skipped elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama.bench import step as bench_step
from mama.bench.step import Measured, measure, measure_plain, measure_to_the_largest
from mama.bench.synthetic import synthetic, tiny
from mama.data import augment
from mama.data.batches import Batch, Texts
from mama.data.loader import load
from mama.errors import ConfigError
from mama.model import attention
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import build
from mama.model.packing import Packing
from mama.model.text_tower import build_text
from mama.model.vision_tower import build_vision
from mama.objective.local_alignment import alignment_scores
from mama.objective.losses import objective
from mama.run import checkpoints
from mama.run.model_state import digests
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, Norm, TextConfig
from mama.train import checkpoint, grad_cache
from mama.train.capacity import room
from mama.train.deepspeed_engine import join_ranks, start_engine
from mama.train.estimate import stand_in
from mama.train.throughput import Meter
from tests.support import tiny_model
from tests.support.checkpoint_folder import weights_of
from tests.support.word_tokenizer import tokenizer

pytestmark = pytest.mark.gpu  # tests/conftest.py skips them where there is no CUDA device

DEVICE = torch.device("cuda")
KERNELS = ["sdpa", "xformers"]
# Of the norm of a difference to the norm of what is wanted: TF32, in which a kernel may multiply, is near 3e-4.
CLOSE = [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def choose(kernel: str, packed: bool = False) -> str:
    """The kernel by our own name, as a run would choose it; skips where xformers cannot run."""
    try:
        return attention.choose(kernel, DEVICE, packed)
    except ConfigError as error:
        pytest.skip(str(error))


def apart(mine: Tensor, theirs: Tensor) -> float:
    """The norm of the difference to the norm of `theirs`; infinite where `mine` is not finite."""
    if not bool(torch.isfinite(mine).all()):
        return math.inf
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


# Attention


class Layer(nn.Module):
    """What a kernel may ask of the layer that calls it."""

    def __init__(self, causal: bool, groups: int) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups


def visible(pattern: str, length: int) -> Tensor | None:
    """bool [3, 1, L, L], which keys a query sees; None where it is all of them."""
    ends = torch.tensor([length, length - 3, length // 2], device=DEVICE)
    padded = (torch.arange(length, device=DEVICE) < ends[:, None])[:, None, None].expand(-1, 1, length, -1)
    causal = torch.ones(3, 1, length, length, dtype=torch.bool, device=DEVICE).tril()
    return {"full": None, "causal": causal, "padded": padded, "padded and causal": padded & causal}[pattern]


def written_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """[B, H, L, d] -> [B, L, H, d], in the type of its inputs."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad((out * direction.to(out.dtype)).sum(), leaves)
    return [out.detach(), *gradients]


@pytest.mark.parametrize("length", [13, 144, 261])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("pattern", ["full", "causal", "padded", "padded and causal"])
@pytest.mark.parametrize(("dtype", "close"), CLOSE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_and_its_gradients_are_the_softmax_in_float64(
    kernel: str, dtype: torch.dtype, close: float, pattern: str, width: int, groups: int, length: int
) -> None:
    choose(kernel)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(3, heads, length, width, generator=generator, device=DEVICE).to(dtype)

    inputs, direction = (draw(6), draw(6 // groups), draw(6 // groups)), draw(6).transpose(1, 2)
    seen, scale = visible(pattern, length), width**-0.5
    layer, mask = Layer(pattern == "causal", groups), None if pattern == "causal" else seen
    function = {"sdpa": attention.sdpa, "xformers": attention.xformers}[kernel]
    got = with_gradients(lambda q, k, v: function(layer, q, k, v, mask, scaling=scale)[0], inputs, direction)
    exact = [x.double() for x in inputs]
    wanted = with_gradients(lambda q, k, v: written_out(q, k, v, seen, scale), exact, direction)
    for name, mine, theirs in zip(("out", "query", "key", "value"), got, wanted, strict=True):
        assert mine.dtype == dtype
        assert apart(mine, theirs) < close, name


PACKED = [1, 7, 77, 143, 144]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", [64, 72, 80, 128])
@pytest.mark.parametrize(("dtype", "close"), CLOSE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_of_packed_sequences_and_its_gradients_are_those_of_each_alone(
    kernel: str, dtype: torch.dtype, close: float, width: int, groups: int, causal: bool
) -> None:
    """Of each by the softmax in float64, and by PyTorch's kernel in the same type; without dropout."""
    choose(kernel, packed=True)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, sum(PACKED), width, generator=generator, device=DEVICE).to(dtype)

    inputs, direction = (draw(6), draw(6 // groups), draw(6 // groups)), draw(6).transpose(1, 2)
    layer, scale = Layer(causal, groups), width**-0.5
    function = {"sdpa": attention.sdpa, "xformers": attention.xformers}[kernel]

    def in_one_row(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(layer, query, key, value, None, scaling=scale, packing=Packing(PACKED))[0]

    def each(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def joined(*row: Tensor) -> Tensor:
            parts = zip(*(tensor.split(PACKED, dim=2) for tensor in row), strict=True)
            return torch.cat([attend(*part) for part in parts], dim=1)

        return joined

    def in_float64(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril() if causal else None
        return written_out(query, key, value, seen, scale)

    def by_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.sdpa(layer, query, key, value, None, scaling=scale)[0]

    got = with_gradients(in_one_row, inputs, direction)
    exact = with_gradients(each(in_float64), [x.double() for x in inputs], direction)
    usual = with_gradients(each(by_pytorch), inputs, direction)
    for name, mine, wanted, theirs in zip(("out", "query", "key", "value"), got, exact, usual, strict=True):
        assert mine.dtype == dtype
        assert apart(mine, wanted) < close, name
        assert apart(mine, theirs) < close, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_its_rate_and_the_same_mask_in_the_backward_pass(kernel: str, dtype: torch.dtype) -> None:
    """With equal scores a sum of ones over the keys is 1 +- sqrt(p / (1 - p) / keys), and linear in the values."""
    choose(kernel)
    keys, p = 256, 0.25
    function = {"sdpa": attention.sdpa, "xformers": attention.xformers}[kernel]
    key = torch.randn(2, 4, keys, 64, device=DEVICE, dtype=dtype)
    query = torch.zeros_like(key)

    def attend(value: Tensor) -> Tensor:
        torch.manual_seed(5)
        return function(Layer(False, 1), query, key, value, None, scaling=0.125, dropout=p)[0]

    sums = attend(torch.ones_like(key))[..., 0].float()
    spread = (p / (1 - p) / keys) ** 0.5
    assert float(sums.mean()) == pytest.approx(1, abs=5 * spread / sums.numel() ** 0.5 + 4e-3)  # bf16 rounds to 4e-3
    assert float(sums.std()) == pytest.approx(spread, rel=0.15)
    value = torch.randn_like(key).requires_grad_()
    out = attend(value)
    assert torch.equal(out, attend(value))  # the seed decides
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * direction).sum(), value)
    out, exact = out.detach().double(), value.detach().double()
    of_out, of_value = (out * direction.double()).sum(), (exact * gradient.double()).sum()
    size = float(out.norm() * direction.double().norm())
    assert abs(float(of_out - of_value)) < (1e-4 if dtype == torch.float32 else 1e-2) * size


def padded(texts: Texts) -> Texts:
    """Every second row 19 tokens shorter."""
    return replace(texts, lengths=[n if row % 2 else n - 19 for row, n in enumerate(texts.lengths)])


def tower_and_input(kind: str, kernel: str, packing: bool, config: Config) -> tuple[nn.Module, Any]:
    """The same weights for every kernel."""
    torch.manual_seed(0)
    batch = synthetic(config, stand_in(config.text)).to(DEVICE)
    if kind == "vision":
        images = batch.anchors.float() / 127.5 - 1
        return build_vision(config.vision, kernel).to(DEVICE).eval(), images
    shapes = {"llama": LLAMA | {"vocab_size": 512}, "bert": BERT | {"vocab_size": 512}}
    text = TextConfig(model=None, config=shapes[kind]) if kind in shapes else config.text
    text = replace(text, packing=packing)
    return build_text(text, stand_in(text), kernel).to(DEVICE).eval(), padded(batch.texts)


def outputs_and_gradients(kind: str, kernel: str, packing: bool, dtype: torch.dtype) -> list[Tensor]:
    tower, given = tower_and_input(kind, kernel, packing, tiny())
    tower = tower.to(dtype)
    out = tower(given.to(dtype) if isinstance(given, Tensor) else given)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    out = out[:2]
    total = torch.stack([(x.float() * torch.linspace(-1, 1, x.shape[-1], device=x.device)).sum() for x in out]).sum()
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    together = torch.cat([x.flatten() for x in gradients if x is not None])  # key biases': 0 but for rounding
    return [x.detach().float() for x in (*out, together)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("kind", "packing"), [("vision", False), *((kind, p) for kind in ("gpt2", "llama", "bert") for p in (False, True))]
)
def test_towers_agree_with_attention_written_out(
    kind: str, packing: bool, kernel: str, dtype: torch.dtype, close: float
) -> None:
    """Global feature, local features and all gradients, by the norm of the difference; of padded texts if of texts."""
    wanted = outputs_and_gradients(kind, "eager", False, dtype)
    got = outputs_and_gradients(kind, choose(kernel, packing), packing, dtype)
    for mine, theirs in zip(got, wanted, strict=True):
        assert apart(mine, theirs) < close


@pytest.mark.parametrize("kernel", KERNELS)
def test_texts_are_packed_while_the_gpu_is_busy(kernel: str) -> None:
    tower, texts = tower_and_input("gpt2", choose(kernel, packed=True), True, tiny())
    waited = []
    for _ in range(3):  # the first reserves memory on the device, the second in pinned memory, and may wait for that
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9)  # cycles: about a second
        awake = torch.cuda.Event()
        awake.record()
        tower(texts)[0].sum().backward()
        waited.append(awake.query())
    assert not waited[-1], "the host has waited for the GPU"


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_tower_on_tissue_alone_is_that_of_the_cpu(kernel: str, dtype: torch.dtype, close: float) -> None:
    """Both features and all gradients, of images that differ in their patches."""
    config, found = tiny(), []
    batch = synthetic(config, stand_in(config.text))
    images = batch.anchors.float() / 127.5 - 1
    for number, image in enumerate(images):
        image[..., (number + 1) * image.shape[-1] // (len(images) + 1) :] = -1
    for device, name in ((torch.device("cpu"), "mama_sdpa"), (DEVICE, choose(kernel, packed=True))):
        torch.manual_seed(0)
        tower = build_vision(replace(config.vision, tokens="tissue"), name).to(device, dtype).eval()
        seen = tower(images.to(device, dtype))
        out = seen.pooled, seen.patches
        total = torch.stack([(x.float() * torch.linspace(-1, 1, x.shape[-1], device=device)).sum() for x in out]).sum()
        trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        together = torch.cat([x.flatten() for x in gradients if x is not None])
        found.append([x.detach().float().cpu() for x in (*out, together)])
        assert len(set(seen.counts)) > 1
    for theirs, mine in zip(*found, strict=True):
        assert apart(mine, theirs) < close


# The rest of the model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize(("dtype", "close"), CLOSE)
def test_alignment_is_that_of_the_cpu(
    dtype: torch.dtype, close: float, temperature: float | None, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(13) < torch.randint(1, 14, (10, 1), generator=generator)
    sentences = F.normalize(torch.randn(10, 13, 64, generator=generator), dim=-1).to(dtype)
    patches = F.normalize(torch.randn(9, 300, 64, generator=generator), dim=-1).to(dtype)
    weights = torch.randn(2, 10, 9, generator=generator)
    tissue = torch.arange(300) < torch.randint(1, 301, (9, 1), generator=generator)

    def on(device: torch.device) -> list[Tensor]:
        leaves = [x.to(device).requires_grad_() for x in (sentences, patches)]
        texts, images = mask.to(device), tissue.to(device) if masked else None
        scores = alignment_scores(leaves[0], texts, leaves[1], 4, images, temperature)
        total = (torch.stack(scores) * weights.to(device)).sum()
        return [x.float().cpu() for x in (*scores, *torch.autograd.grad(total, leaves))]

    absolute = 1e-5 if dtype == torch.float32 else 1e-2  # of gradients that are rounded to bf16
    for mine, theirs in zip(on(DEVICE), on(torch.device("cpu")), strict=True):
        torch.testing.assert_close(mine, theirs, atol=absolute, rtol=0)
        assert apart(mine, theirs) < close


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("parts", [tiny_model.on_tissue, tiny_model.on_parts])
def test_the_objective_is_that_of_the_cpu(parts: Callable[[Config], Config], norm: Norm, kernel: str) -> None:
    """Each term and each gradient: with tissue alone, and with sentences alone, findings and the soft maximum.

    A gradient that is next to nothing beside the whole may be rounding: of keys' biases, and in front of batch norms.
    """
    config = parts(tiny_model.tiny(1, attention=kernel))
    config = replace(config, heads=replace(config.heads, norm=norm))
    try:
        kernels = attention.choose_both(config, DEVICE)
    except ConfigError as error:
        pytest.skip(str(error))
    found = []
    for device, (image, text) in ((torch.device("cpu"), ("mama_sdpa",) * 2), (DEVICE, kernels)):
        model = tiny_model.with_lora(build(config, tokenizer(), image, text)).to(device)
        batch = tiny_model.batch_of(config, range(tiny_model.PAIRS)).to(device)
        total, terms = objective(model(batch), config.loss, step=0)
        total.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append(({name: term.item() for name, term in terms.items()}, gradients))
    (expected, theirs), (got, mine) = found
    assert got == pytest.approx(expected, rel=1e-3)
    assert mine.keys() == theirs.keys()
    whole = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-2 * max(gradient.norm(), 1e-4 * whole), name


def test_augmentation_is_that_of_the_cpu() -> None:
    config = tiny()
    batch = synthetic(config, stand_in(config.text))
    wanted = augment.apply(batch.anchors, batch.anchor_changes)
    moved = batch.to(DEVICE)
    got = augment.apply(moved.anchors, moved.anchor_changes).cpu()
    assert apart(got, wanted) < 1e-2  # a pixel at an edge of the crop may fall on its other side


# Loading


def numbered(rows: list[int]) -> Batch:
    config = tiny()
    return replace(synthetic(config, stand_in(config.text)), text_ids=torch.tensor(rows))


def tensors_of(batch: Batch) -> list[Tensor]:
    return [x for x in (*vars(batch).values(), *vars(batch.texts).values()) if isinstance(x, Tensor)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_and_fetched_while_the_gpu_is_busy(workers: int) -> None:
    """The host does not wait for what the GPU does, and forgets a batch before it is copied."""
    config = tiny()
    config = replace(config, data=replace(config.data, workers=workers))
    wanted = list(load(range(6), config, numbered, batch_size=2))  # type: ignore[arg-type]
    with closing(load(range(6), config, numbered, DEVICE, batch_size=2)) as batches:  # type: ignore[arg-type]
        pinned = list(batches)
    meter = Meter(build(config, stand_in(config.text), "mama_sdpa"), config.data.image_size, DEVICE)
    assert not any(tensor.is_pinned() for batch in wanted for tensor in tensors_of(batch))
    assert all(tensor.is_pinned() for batch in pinned for tensor in tensors_of(batch))
    meter.fetch(iter(wanted))  # reserves memory on the device
    zeros = torch.zeros_like(wanted[0].anchors)
    zeros.pin_memory()  # and this in pinned memory: to reserve some may wait for the GPU
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    awake = torch.cuda.Event()
    awake.record()
    moved = []
    for _ in wanted:
        moved.append(meter.fetch(iter([pinned.pop(0)])))
        zeros.pin_memory()  # not where a batch lies that is still to be copied
    assert not awake.query(), "the host has waited for the GPU"
    for one, two in zip(wanted, moved, strict=True):
        assert (one.keys, one.unreadable) == (two.keys, two.unreadable)
        assert {tensor.device.type for tensor in tensors_of(two)} == {"cuda"}
        assert all(map(torch.equal, tensors_of(one), (tensor.cpu() for tensor in tensors_of(two))))


def test_the_memory_that_a_rank_may_take_is_what_no_tensor_holds() -> None:
    before = room(DEVICE)
    held = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    assert before - room(DEVICE) == pytest.approx(2**30, rel=0.1)
    del held
    assert room(DEVICE) == pytest.approx(before, rel=0.1)


# Training: every way to make the same three updates, in one process for each precision


WAYS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "xformers": {"attention": "xformers"},
    "activation checkpointing": {"activation_checkpointing": True},
    "gradient caching": {"grad_cache": True, "micro_batch": 4},
    "resumed ZeRO-1": {"zero_stage": 1},
    "resumed ZeRO-2": {"zero_stage": 2},
    # Last: stage 3 replaces F.linear for the whole process, by one that rounds otherwise in bf16.
    "ZeRO-3": {"zero_stage": 3},
    "offload": {"zero_stage": 3, "offload": True},
    "resumed ZeRO-3": {"zero_stage": 3},
    "resumed offload": {"zero_stage": 3, "offload": True},
}
COMPILED: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"compile": False},
    "compiled": {"compile": True},
    "compiled with xformers": {"compile": True, "attention": "xformers"},
    "compiled and checkpointed": {"compile": True, "activation_checkpointing": True},
    "compiled, gradient caching": {"compile": True, "grad_cache": True, "micro_batch": 4},
    "resumed compiled": {"compile": True},
}
UPDATES = 3


def every_way() -> list[Any]:
    """Precision, how close losses are, compiled, way; those of one process go to one worker."""
    return [
        pytest.param(precision, close, compiled, way, marks=pytest.mark.xdist_group(f"{precision}, {compiled}"))
        for precision, close in (("fp32", 1e-3), ("bf16", 3e-2))
        for compiled, ways in ((False, WAYS), (True, COMPILED))
        for way in ways
    ]


def three_updates(precision: Any, compiled: bool, runs: Path) -> Config:
    """Without dropout, so that kernels and micro-batches may draw as they like."""
    config = tiny()
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    train = replace(
        config.train,
        precision=precision,
        attention="sdpa",
        activation_checkpointing=False,
        steps=UPDATES,
        compile=compiled,
    )
    return replace(
        config,
        runs=str(runs),
        text=replace(config.text, config=config.text.config | still, lora_dropout=0.0),
        optim=replace(config.optim, lr=1e-3, warmup_steps=0),
        train=train,
    )


def halves(batch: Batch) -> list[Batch]:
    """Two micro-batches with the pairs of one."""
    names = (
        *("keys", "anchors", "partners", "anchor_changes", "partner_changes", "text_ids", "partner_text_ids"),
        *("finding_mask", "finding_ids"),
    )
    found = []
    for rows in (slice(0, 4), slice(4, 8)):
        texts = batch.texts
        own = Texts(
            texts.tokens[rows],
            texts.lengths[rows],
            texts.separators[rows],
            texts.sentence_mask[rows],
            texts.sentences,
            texts.sentence_row[rows],
        )
        numbers = torch.arange(4, device=batch.anchors.device)
        parts = {name: getattr(batch, name)[rows] for name in names}
        found.append(Batch(**parts, texts=own, anchor_text_row=numbers, partner_text_row=numbers))
    return found


def updates(config: Config, batch: Batch, steps: range, resumed: Path | None) -> list[float]:
    """The loss before each update of a model that starts anew or from a checkpoint; saved after each of them."""
    torch._dynamo.reset()  # its limit on compilations is of the process
    model = build(config, stand_in(config.text), *attention.choose_both(config, batch.anchors.device))
    prepare_blocks(model, config.train, batch.anchors.device)
    frozen = digests(model)
    if resumed:
        checkpoints.load_weights(model, resumed, frozen)
    engine = start_engine(model, config)
    if resumed:
        checkpoint.load_optimizer(engine, resumed)
    engine.train()
    losses = []
    for step in steps:
        if config.train.grad_cache:
            total, *_ = grad_cache.backward(engine, halves(batch), lambda n: None, config.loss, config.loss.local_start)
        else:
            total, _ = objective(engine(batch), config.loss, step=config.loss.local_start)
            engine.backward(total)
        engine.step()
        losses.append(total.item())
        checkpoint.save(engine, config.run_folder, step + 1, UPDATES, frozen)
    return losses


def all_ways(config: Config) -> dict[str, tuple[list[float], float] | str]:
    """On one rank: by way the three losses, and how far a resumed run's weights are from an uninterrupted one's."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = join_ranks()
    batch = synthetic(config, stand_in(config.text)).to(device)
    found: dict[str, tuple[list[float], float] | str] = {}
    for way, changes in (COMPILED if config.train.compile else WAYS).items():
        staged = replace(config, name=way.replace(" ", "-"), train=replace(config.train, **changes))
        try:
            found[way] = one_way(way, staged, batch)
        except Exception as error:  # the other ways are worth knowing
            found[way] = f"{type(error).__name__}: {error}"
    torch.distributed.destroy_process_group()
    return found


def one_way(way: str, config: Config, batch: Batch) -> tuple[list[float], float]:
    if not way.startswith("resumed "):
        return updates(config, batch, range(UPDATES), None), 0.0
    before = Path(config.runs) / way.removeprefix("resumed ") / "checkpoints"
    losses = updates(config, batch, range(1, UPDATES), before / "step-000001")
    first, whole, again = (
        torch.cat([x.flatten() for _, x in sorted(weights_of(folder).items())])
        for folder in (before / "step-000001", before / "step-000003", config.run_folder / "checkpoints/step-000003")
    )
    return losses, float((again - whole).norm() / (whole - first).norm())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], dict[str, Any]]:
    found: dict[tuple[str, bool], dict[str, Any]] = {}

    def of(precision: str, compiled: bool) -> dict[str, Any]:
        if (precision, compiled) not in found:
            config = three_updates(precision, compiled, tmp_path_factory.mktemp("runs"))
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                found[precision, compiled] = run_on_ranks(all_ways, config)
        return found[precision, compiled]

    return of


@pytest.mark.parametrize(("precision", "close", "compiled", "way"), every_way())
def test_every_way_makes_the_same_updates(trained: Any, precision: str, close: float, compiled: bool, way: str) -> None:
    """And a resumed run ends at the weights of an uninterrupted one, by kernels that are deterministic."""
    if "xformers" in way:
        choose("xformers")
    ways = trained(precision, compiled)
    for needed in ("ZeRO-2", way):
        assert not isinstance(ways[needed], str), ways[needed]
    wanted, _ = ways["ZeRO-2"]
    losses, gap = ways[way]
    assert wanted[-1] < wanted[0]
    assert losses == pytest.approx(wanted[-len(losses) :], rel=close)
    assert gap < 1e-5


# Measuring


def measure_in_2_gb(config: Config) -> list[Measured]:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    bench_step._memory_of = lambda device: 2.0
    return measure_to_the_largest(config)


def measure_in_32_mb(config: Config) -> list[Measured]:
    torch.cuda.set_per_process_memory_fraction(2**25 / torch.cuda.get_device_properties(0).total_memory)
    return measure(config)


def to_measure(**changes: Any) -> Config:
    config = tiny()
    settings: dict[str, Any] = {"precision": "bf16", "steps": 3} | changes
    return replace(config, train=replace(config.train, **settings))


def test_a_step_is_measured_up_to_the_largest_batch_that_fits() -> None:
    config = to_measure(attention="auto", micro_batch=64, global_batch=64)
    wanted, largest = run_on_ranks(measure_in_2_gb, config)
    assert (wanted.pairs, largest.pairs > 64) == (64, True)
    assert 0 < wanted.memory_gb < largest.memory_gb < 2
    assert wanted.rate > 0


@pytest.mark.parametrize("measure_one", [measure_plain, partial(measure_plain, as_published=True)])
def test_the_plain_step_is_measured(measure_one: Callable[[Config], list[Measured]]) -> None:
    (measured,) = run_on_ranks(measure_one, to_measure(attention="sdpa"))
    assert measured.rate > 0
    assert 0 < measured.memory_gb < 2


def test_a_batch_that_does_not_fit_is_told_as_such() -> None:
    large = to_measure(global_batch=16, micro_batch=16)
    assert run_on_ranks(measure_in_32_mb, replace(large, data=replace(large.data, image_size=(512, 512)))) == []
