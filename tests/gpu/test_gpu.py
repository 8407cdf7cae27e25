"""What only a CUDA device can show; all of it is skipped elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mama import attention
from mama.alignment import alignment_scores
from mama.bench_step import Measured, measure, synthetic, tiny
from mama.config import Config, ConfigError, TextConfig
from mama.dryrun import stand_in
from mama.launch import run_on_ranks
from mama.losses import objective
from mama.model import build
from mama.towers import build_text, build_vision

pytestmark = pytest.mark.gpu  # tests/conftest.py skips them where there is no CUDA device

KERNELS = ["sdpa", "xformers"]
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def tower_and_input(kind: str, kernel: str, config: Config) -> tuple[nn.Module, Any]:
    """The same weights for every kernel."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    batch = synthetic(config, stand_in(config.text)).to(device)
    if kind == "vision":
        images = batch.anchors.float() / 127.5 - 1
        return build_vision(config.vision, kernel).to(device).eval(), images
    text = config.text if kind == "gpt2" else TextConfig(model=None, config=LLAMA | {"vocab_size": 512})
    return build_text(text, stand_in(text), kernel).to(device).eval(), batch.texts


def outputs_and_gradients(kind: str, kernel: str, dtype: torch.dtype) -> list[Tensor]:
    tower, given = tower_and_input(kind, kernel, tiny())
    tower = tower.to(dtype)
    out = tower(given.to(dtype) if isinstance(given, Tensor) else given)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    total = torch.stack([(x.float() * torch.linspace(-1, 1, x.shape[-1], device=x.device)).sum() for x in out]).sum()
    gradients = torch.autograd.grad(total, trained, allow_unused=True)
    together = torch.cat(
        [x.flatten() for x in gradients if x is not None]
    )  # those of key biases are 0 but for rounding
    return [x.detach().float() for x in (*out, together)]


def choose(kernel: str) -> str:
    """The kernel by our own name, as a run would choose it; skips where xformers cannot run."""
    try:
        return attention.choose(kernel, torch.device("cuda"))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["vision", "gpt2", "llama"])
def test_kernels_agree_with_attention_written_out(kind: str, kernel: str, dtype: torch.dtype, close: float) -> None:
    """Global feature, local features and all gradients, by the norm of the difference."""
    wanted = outputs_and_gradients(kind, "eager", dtype)
    for mine, theirs in zip(outputs_and_gradients(kind, choose(kernel), dtype), wanted, strict=True):
        assert (mine - theirs).norm() < close * theirs.norm()


def losses_by_stage(config: Config) -> dict[int, list[float]]:
    """On one rank: the loss before each of three updates, under ZeRO stages 1 to 3 from the same start."""
    from mama.engine import join_ranks, start_engine

    device = join_ranks()
    tokenizer = stand_in(config.text)
    batch = synthetic(config, tokenizer).to(device)
    losses: dict[int, list[float]] = {}
    for stage in (1, 2, 3):
        model = build(config, tokenizer, attention.choose("sdpa", device))
        staged = replace(config, train=replace(config.train, zero_stage=stage))
        engine = start_engine(model, staged)
        losses[stage] = []
        for step in range(3):
            torch.manual_seed(step)
            total, _ = objective(engine(batch), config.loss, step=config.loss.local_start)
            engine.backward(total)
            engine.step()
            losses[stage].append(total.item())
    torch.distributed.destroy_process_group()
    return losses


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_every_zero_stage_trains_alike_and_the_loss_falls(precision: Any, close: float) -> None:
    config = tiny()
    optim = replace(config.optim, lr=1e-3, warmup_steps=0)
    config = replace(config, optim=optim, train=replace(config.train, precision=precision))
    losses = run_on_ranks(losses_by_stage, config)
    for stage, values in losses.items():
        assert values == pytest.approx(losses[1], rel=close), stage
        assert values[-1] < values[0], stage


@pytest.mark.parametrize("attention_kernel", KERNELS)
def test_a_step_in_bf16_is_measured(attention_kernel: Any) -> None:
    choose(attention_kernel)
    config = tiny()
    train = replace(config.train, precision="bf16", attention=attention_kernel, steps=3)
    measured = run_on_ranks(measure, replace(config, train=train))
    assert measured is not None
    assert measured.rate > 0
    assert 0 < measured.memory_gb < 2


def measure_in_32_mb(config: Config) -> Measured | None:
    torch.cuda.set_per_process_memory_fraction(2**25 / torch.cuda.get_device_properties(0).total_memory)
    return measure(config)


def test_a_batch_that_does_not_fit_is_told_as_such() -> None:
    config = tiny()
    train = replace(config.train, global_batch=16, micro_batch=16, steps=2)
    large = replace(config, data=replace(config.data, image_size=(512, 512)), train=train)
    assert run_on_ranks(measure_in_32_mb, large) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alignment_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(13) < torch.randint(1, 14, (10, 1), generator=generator)
    sentences = F.normalize(torch.randn(10, 13, 64, generator=generator), dim=-1).to(dtype)
    patches = F.normalize(torch.randn(9, 300, 64, generator=generator), dim=-1).to(dtype)
    weights = torch.randn(2, 10, 9, generator=generator)

    def on(device: str) -> list[Tensor]:
        leaves = [x.to(device).requires_grad_() for x in (sentences, patches)]
        scores = alignment_scores(leaves[0], mask.to(device), leaves[1], chunk=4)
        total = (torch.stack(scores) * weights.to(device)).sum()
        return [x.float().cpu() for x in (*scores, *torch.autograd.grad(total, leaves))]

    close = 1e-5 if dtype == torch.float32 else 1e-2  # of gradients that are rounded to bf16
    for mine, theirs in zip(on("cuda"), on("cpu"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=close, rtol=0)
