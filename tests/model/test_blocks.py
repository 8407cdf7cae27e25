"""Compiled blocks of the image tower, by the compiler itself, on the CPU: in training only, once for all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mama.errors import ConfigError
from mama.model import blocks
from mama.model.backbones import blocks_of
from mama.model.blocks import prepare_blocks
from mama.model.mama_model import MamaModel, build
from mama.objective.losses import objective
from mama.settings.schema import Config, TrainConfig, VisionConfig
from tests.support.tiny_model import batch_of, tiny
from tests.support.word_tokenizer import tokenizer

CPU = torch.device("cpu")
LAYERS = 10  # more than the compiler would compile anew for


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but with the compiler's own stand-in for kernels, which takes no C compiler and no minute."""
    monkeypatch.setattr(blocks, "_obstacle", lambda config, device: None)
    real = torch.compile
    monkeypatch.setattr(blocks.torch, "compile", lambda function: real(function, backend="aot_eager"))


def deep() -> Config:
    config = tiny(1)
    shape = config.vision.config | {"num_hidden_layers": LAYERS}
    return replace(config, vision=VisionConfig(model=None, config=shape))


def gradients(config: Config, train: TrainConfig) -> tuple[MamaModel, dict[str, Tensor]]:
    model = build(config, tokenizer(), "mama_sdpa")
    prepare_blocks(model, train, CPU)
    objective(model(batch_of(config, range(4))), config.loss, step=0)[0].backward()
    return model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_have_the_same_gradients(compiling: None, checkpointing: bool) -> None:
    config = deep()
    _, wanted = gradients(config, replace(config.train, compile=False, activation_checkpointing=False))
    assert not counters["stats"]
    model, got = gradients(config, replace(config.train, compile=True, activation_checkpointing=checkpointing))
    assert counters["stats"]["unique_graphs"] == 1, "one compilation serves all blocks"
    assert not counters["graph_break"]
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        model.eval()(batch_of(config, range(3)))
    assert counters["stats"]["unique_graphs"] == 1, "evaluation compiles nothing"


@pytest.mark.parametrize(
    ("device", "stage", "compiler", "header", "reason"),
    [
        ("cpu", 2, "/usr/bin/cc", "Python.h", "the device is cpu"),
        ("cuda", 3, "/usr/bin/cc", "Python.h", "ZeRO stage 3 gathers weights inside of them"),
        ("cuda", 2, None, "Python.h", "there is no C compiler: gcc and clang not found"),
        ("cuda", 2, "/usr/bin/cc", "other.h", "Python's headers are not installed"),
        ("cuda", 2, "/usr/bin/cc", "Python.h", None),
    ],
)
def test_what_stands_in_the_way_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    device: str,
    stage: Any,
    compiler: str | None,
    header: str,
    reason: str | None,
) -> None:
    (tmp_path / header).touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(blocks.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(blocks.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(blocks.torch, "compile", lambda function: function)
    config = tiny(1)
    model = build(config, tokenizer(), "mama_sdpa")
    with caplog.at_level(logging.INFO, "mama.model.blocks"):
        prepare_blocks(model, replace(config.train, zero_stage=stage), torch.device(device))
    assert [record.getMessage() for record in caplog.records] == [
        f"blocks of the image tower: {f'not compiled ({reason})' if reason else 'compiled'}"
    ]


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Linear: this version of transformers marks no blocks in it"):
        blocks_of(torch.nn.Linear(1, 1))
