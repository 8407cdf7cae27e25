"""What a machine has decides how a run is started there: its GPUs, and whether git is installed."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mama.errors import TrainingError
from mama.quickstart import recipes
from mama.run.environment import environment
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_gpu")
def test_quickstart_takes_one_gpu_with_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, alone = recipes(tmp_path, seed=0)
    assert (alone.train.ranks, alone.train.accumulation(1)) == (1, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, two = recipes(tmp_path, seed=0)
    assert two.train.ranks == 2
    assert alone.contrastive_batch(1) == two.contrastive_batch(2)
    assert alone.train.global_batch == two.train.global_batch


def test_a_machine_without_git_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(environment()["commit"] or "") in (0, 40)  # none where the sources are no checkout

    def missing(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", missing)
    described = environment()
    assert described["commit"] is None
    assert described["versions"]["torch"]


def test_an_occupied_port_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = Config(name="run", runs=str(tmp_path))
    with socket.create_server(("", 0)) as server:
        rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (rank | {"MASTER_PORT": str(server.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainingError, match=r"MASTER_PORT: 127\.0\.0\.1:\d+: another program uses") as caught:
            run_on_ranks(lambda config: dist.init_process_group("gloo"), config)
    assert "\n" not in str(caught.value)
