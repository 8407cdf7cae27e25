"""Loader processes that die, hang or find no shared memory: one line, at once or after the time limit."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mama.bench.synthetic import synthetic, tiny
from mama.data import loader
from mama.data.batches import Batch
from mama.errors import ConfigError, TrainingError
from mama.settings.schema import Config, DataConfig, TrainConfig
from mama.train.estimate import stand_in
from shards.errors import ShardError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = Config(data=DataConfig(image_size=(518, 518), workers=2), train=TrainConfig(timeout=2))

ONE_WORKER = replace(CONFIG, data=replace(CONFIG.data, workers=1))


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


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """PyTorch believes in a GPU, and its thread pins by a plain copy. Returns what was pinned."""
    copies: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    answers = {"is_available": True, "current_accelerator": CUDA, "current_device_index": 0, "set_device_index": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return copies


def left_over() -> list[Any]:
    """Processes of loaders and threads that pin."""
    threads = [thread for thread in threading.enumerate() if "pin_memory" in thread.name]
    return threads + [child for child in multiprocessing.active_children() if "DataLoader" in repr(child)]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
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
def test_a_process_that_stops_or_dies_is_named_and_none_is_left(
    pinned: list[Tensor], number: int, message: str, device: torch.device
) -> None:
    batches = loader.load(Struck(number), CONFIG, device=device, batch_size=1)
    # The death may be noticed anywhere: as the next batch is taken, or as here between two of them.
    with pytest.raises(TrainingError, match=message) as caught, loader.plain_failures():
        list(map(slowly, batches))
    assert "\n" not in str(caught.value)
    pid = int(re.search(message, str(caught.value))[1])  # type: ignore[index]
    batches.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not left_over()


BATCH = synthetic(tiny(), stand_in(tiny().text))


def batch_of(rows: list[int]) -> Batch:
    return replace(BATCH, text_ids=torch.tensor(rows), unreadable=len(rows))


def tensors_of(batch: Batch) -> list[Tensor]:
    of_all = (*vars(batch).values(), *vars(batch.texts).values(), *vars(batch.texts.sentences).values())
    return [x for x in of_all if isinstance(x, Tensor)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_where_they_are_meant_for_a_gpu(pinned: list[Tensor], workers: int) -> None:
    """All of a batch, also its texts; its numbers and their order are the same."""
    config = replace(CONFIG, data=replace(CONFIG.data, workers=workers))
    plain, for_gpu = (
        list(loader.load(range(6), config, batch_of, device, batch_size=2))  # type: ignore[arg-type]
        for device in (CPU, CUDA)
    )
    assert [batch.text_ids.tolist() for batch in plain] == [[0, 1], [2, 3], [4, 5]]
    for one, other in zip(plain, for_gpu, strict=True):
        assert (one.keys, one.unreadable) == (other.keys, other.unreadable)
        assert all(map(torch.equal, tensors_of(one), tensors_of(other)))
    found = [id(tensor) for batch in for_gpu for tensor in tensors_of(batch)]
    assert found
    assert set(found) == set(map(id, pinned)), "and nothing of those for the CPU"
    assert len(tensors_of(BATCH)) == 15
    assert not left_over()


class Unreceived:
    """The process that receives it finds no file for it."""

    def __reduce__(self) -> Any:
        return exec, ("raise RuntimeError('received 0 items of ancdata')",)


def unreadable(rows: list[int]) -> Any:
    if rows != [0]:
        raise ShardError("train-000000.tar: it is damaged")
    return torch.tensor(rows)


def unreceived(rows: list[int]) -> Any:
    return Unreceived() if rows != [0] else torch.tensor(rows)


def unpinned(rows: list[int]) -> Any:
    return Unpinned() if rows != [0] else torch.tensor(rows)


class Unpinned:
    def pin_memory(self) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported.")


@pytest.mark.parametrize(
    ("collate", "error"),
    [
        (unreadable, ShardError("train-000000.tar: it is damaged")),
        (
            unreceived,
            TrainingError(
                "too many open files in the loader processes; raise the limit (ulimit -n), or lower data.workers"
            ),
        ),
        (
            unpinned,
            TrainingError(
                "a batch could not be copied to pinned memory (RuntimeError: CUDA error: out of memory); if memory "
                "ran out, lower data.workers or train.micro_batch; it is safe to run again"
            ),
        ),
    ],
)
def test_what_fails_before_or_in_the_thread_that_pins_is_one_line(
    pinned: list[Tensor], collate: Any, error: Exception, capfd: pytest.CaptureFixture[str]
) -> None:
    batches = loader.load(range(8), ONE_WORKER, collate, CUDA, batch_size=1)  # type: ignore[arg-type]
    assert next(batches).tolist() == [0]
    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
        list(batches)
    assert not left_over()
    assert capfd.readouterr().err == ""


class Awaited:
    """The thread that receives it waits until its process ends."""

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __reduce__(self) -> Any:
        return wait_for, (self.pid,)


def wait_for(pid: int) -> None:
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def awaited(rows: list[int]) -> Any:
    return Awaited() if rows != [0] else torch.tensor(rows)


@pytest.mark.parametrize("collate", [awaited, torch.tensor])
def test_an_early_end_leaves_no_thread_and_no_process(
    pinned: list[Tensor], monkeypatch: pytest.MonkeyPatch, collate: Any
) -> None:
    """Also where the thread waits for a process that was stopped while it handed its batch over."""
    monkeypatch.setattr(loader, "PATIENCE", 0.5)
    batches = loader.load(range(8), ONE_WORKER, collate, CUDA, batch_size=1)  # type: ignore[arg-type]
    assert next(batches).tolist() == [0]
    batches.close()
    for thread in left_over():
        thread.join(5)
    assert not left_over()


def test_a_full_shared_memory_is_one_line_and_no_wait(tmp_path: Path) -> None:
    """The process that cannot place its batch says so at once, long before the time limit of ten minutes."""
    program = tmp_path / "fill.py"
    program.write_text(
        "import torch\n"
        "from mama.settings.schema import Config\n"
        "from mama.data.loader import load\n"
        "rows = [torch.zeros(3 * 2**20, dtype=torch.uint8)] * 8\n"
        "list(load(rows, Config(), batch_size=2))\n"
    )
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "
    command = ["unshare", "--mount", "sh", "-c", f"{mount} {sys.executable} {program}"]
    if subprocess.run([*command[:4], f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("a /dev/shm of its own needs root")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.strip().splitlines()[-1] == (
        "mama.errors.TrainingError: a loader process has no room for its batch in /dev/shm; start the "
        "container with a larger --shm-size, or set data.workers=0"
    )


def test_batches_in_flight_must_fit_into_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's batch: 36 pairs of 518 x 518 bytes, two ahead for each of two processes, are 73.7 MiB a rank."""
    free = 64 * 2**20
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"^data\.workers: 2 .* 1 ranks keep 74 MiB .*, but 64 MiB are free; .*138m"):
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
