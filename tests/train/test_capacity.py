"""What a machine cannot hold is refused before a process is started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mama.errors import ConfigError
from mama.runtime.collectives import rank
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from mama.train import capacity
from mama.train.deepspeed_engine import join_ranks
from mama.train.loop import train
from tests.support.tiny_model import tiny

CPU = torch.device("cpu")


def of(ranks: int, **settings: object) -> Config:
    config = tiny(2)
    return replace(config, train=replace(config.train, ranks=ranks, global_batch=ranks, micro_batch=1, **settings))  # type: ignore[arg-type]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container of two of 64 cores and 2 GiB, half of it in use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(capacity, "_cgroup", lambda: iter([tmp_path / "inner", tmp_path]))
    (tmp_path / "inner").mkdir()
    for name, text in {
        "cpu.max": "200000 100000",
        "inner/cpu.max": "max 100000",
        "memory.max": str(2 * 2**30),
        "memory.current": str(3 * 2**29),
        "memory.stat": f"anon 5\ninactive_file {2**29}",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


def test_the_limits_of_a_container_count(machine: Path) -> None:
    assert capacity.cores() == 2
    assert capacity.free_memory() == 2**30
    (machine / "cpu.max").write_text("50000 100000\n")
    assert capacity.cores() == 1


def test_ranks_that_the_machine_cannot_hold_are_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^train\.ranks: 64, but this process may use 2 cores; .*oversubscribe=true"):
        train(of(64))
    with pytest.raises(ConfigError, match=r"^train\.ranks: 2 ranks take about 1\.2 GiB .*, and 1\.0 GiB of memory"):
        train(of(2))
    capacity.require_capacity(of(64, oversubscribe=True))
    (machine / "memory.max").write_text("max\n")
    capacity.require_capacity(of(2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"^train\.ranks: 2, but this machine shows 1 GPUs"):
        train(of(2, oversubscribe=True))


@pytest.mark.parametrize(("free", "again"), [(1112, False), (1110, True)])
def test_activations_are_kept_where_nine_tenths_of_the_free_memory_suffice(
    monkeypatch: pytest.MonkeyPatch, free: int, again: bool
) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda: 2 * free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = of(2, activation_checkpointing="auto")
    assert capacity.decided(config, 1000, CPU) == of(2, activation_checkpointing=again)


@pytest.mark.parametrize("chosen", [True, False])
def test_what_is_chosen_is_not_decided(monkeypatch: pytest.MonkeyPatch, chosen: bool) -> None:
    monkeypatch.setattr(capacity, "room", lambda device: 1000 * (not chosen))
    config = of(2, activation_checkpointing=chosen)
    assert capacity.decided(config, 500, CPU) is config


@pytest.mark.parametrize("poor", [None, 0, 1])
def test_ranks_decide_alike(poor: int | None) -> None:
    config = of(2, activation_checkpointing="auto", timeout=60 if poor is None else poor + 1)
    assert run_on_ranks(decisions, config) == [poor is not None] * 2


def decisions(config: Config) -> list[object]:
    """What each rank decides, if the memory of rank `train.timeout` - 1 does not suffice."""
    device = join_ranks()
    capacity.room = lambda device: 10 if rank() == config.train.timeout - 1 else 1000
    mine = capacity.decided(config, 500, device).train.activation_checkpointing
    found: list[object] = [None, None]
    dist.all_gather_object(found, mine)
    dist.destroy_process_group()
    return found
