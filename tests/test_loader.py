"""Loader processes that die, hang or find no shared memory: one line, at once or after the time limit."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from mama import loader
from mama.config import Config, ConfigError, DataConfig, TrainConfig
from mama.errors import TrainingError

CONFIG = Config(data=DataConfig(image_size=(518, 518), workers=2), train=TrainConfig(timeout=2))


class Struck(Dataset[torch.Tensor]):
    """Its second row sends the process that reads it a signal."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 1:
            os.kill(os.getpid(), self.number)
        return torch.full((3,), index)


def slowly(batch: torch.Tensor) -> None:
    time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSTOP, r"no batch for 2 s from the loader process (\d+) \(stopped by a signal\); .*data\.workers=0"),
        (
            signal.SIGKILL,
            r"the loader process (\d+) ended \((?:is killed by signal: Killed|exited unex.*)\); if memory ran out",
        ),
        (
            signal.SIGBUS,
            r"the loader process (\d+) ended \(is killed by signal: Bus error\); /dev/shm is full: .*--shm",
        ),
    ],
)
def test_a_process_that_stops_or_dies_is_named_and_none_is_left(number: int, message: str) -> None:
    batches = loader.load(Struck(number), CONFIG, batch_size=1)
    # The death may be noticed anywhere: as the next batch is taken, or as here between two of them.
    with pytest.raises(TrainingError, match=message) as caught, loader.plain_failures():
        list(map(slowly, batches))
    assert "\n" not in str(caught.value)
    pid = int(re.search(message, str(caught.value))[1])  # type: ignore[index]
    batches.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not [child for child in multiprocessing.active_children() if "DataLoader" in repr(child)]


def test_a_full_shared_memory_is_one_line_and_no_wait(tmp_path: Path) -> None:
    """The process that cannot place its batch says so at once, long before the time limit of ten minutes."""
    program = tmp_path / "fill.py"
    program.write_text(
        "import torch\n"
        "from mama.config import Config\n"
        "from mama.loader import load\n"
        "rows = [torch.zeros(3 * 2**20, dtype=torch.uint8)] * 8\n"
        "list(load(rows, Config(), batch_size=2))\n"
    )
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "
    command = ["unshare", "--mount", "sh", "-c", f"{mount} {sys.executable} {program}"]
    if subprocess.run([*command[:4], f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("a /dev/shm of its own needs root")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().splitlines()[-1] == (
        "mama.errors.TrainingError: a loader process found no room for its batch in /dev/shm; start the container "
        "with a larger --shm-size, or set data.workers=0"
    )


def test_batches_in_flight_must_fit_into_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's batch: 36 pairs of 518 x 518 bytes, two ahead for each of two processes, are 73.7 MiB a rank."""
    free = 64 * 2**20
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(
        ConfigError, match=r"^data\.workers: 2 .* 1 ranks keep 74 MiB .*, where 64 MiB are free; .*138m"
    ):
        loader.require_shared_memory(CONFIG, 72)
    with pytest.raises(ConfigError, match=r"each of 4 ranks keep 295 MiB"):
        loader.require_shared_memory(CONFIG, 72, 4)
    loader.require_shared_memory(CONFIG, 60)
    loader.require_shared_memory(replace(CONFIG, data=replace(CONFIG.data, workers=0)), 72, 8)


def test_the_file_that_a_hanging_process_reads_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "train-000003.tar"
    os.mkfifo(shard)
    reader = subprocess.Popen(["cat", str(shard)])
    with shard.open("wb"):
        deadline = time.monotonic() + 10
        while not (said := loader._state(reader.pid)) and time.monotonic() < deadline:
            time.sleep(0.01)
    reader.wait()
    assert said == f" (reading {shard})"
