"""Who ends when another process stops or dies: ranks, their launcher, workers; and signals before anybody listens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HEART = """
import sys, time
from pathlib import Path
from mama.train.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]), 2, 1.5, False)
heart.doing("in step 7")
while not heart._read(1 - heart.rank):
    time.sleep(0.01)
with heart.watching():
    print("beating", flush=True)
    time.sleep(60)
"""
LAUNCHER = """
import sys, time
from pathlib import Path
from mama.runtime import preemption
from mama.settings.schema import Config, TrainConfig
from mama.runtime.launch import run_on_ranks

def rank(config):
    preemption.record_signals()
    Path(config.runs, "started").touch()
    while not preemption.signal_received():
        time.sleep(0.01)
    Path(config.runs, "saved").touch()

if __name__ == "__main__":
    run_on_ranks(rank, Config(runs=sys.argv[1], train=TrainConfig(global_batch=36)))
"""
POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from shards.pack.workers import _pool
if __name__ == "__main__":
    pool = _pool(2)
    print(*[pool.submit(time.sleep, 0.1).result() for _ in range(2)], *pool._processes, flush=True)
    pool.submit(time.sleep, 100)
    pool.submit(time.sleep, 100).result()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, *(["-c", program] if "\n" in program else [program]), *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True)


def wait_for(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def session(process: subprocess.Popen[str]) -> list[str]:
    """The processes of its session, without itself."""
    said = subprocess.run(["ps", "-s", str(process.pid), "-o", "pid=,stat="], capture_output=True, text=True).stdout
    pids = [line.split()[0] for line in said.splitlines() if "Z" not in line]
    return [pid for pid in pids if pid != str(process.pid)]


def test_a_rank_that_stands_still_is_named_by_the_others(tmp_path: Path) -> None:
    ranks = [start(HEART, tmp_path, number) for number in range(2)]
    for rank in ranks:
        assert rank.stdout
        assert rank.stdout.readline() == "beating\n"
    time.sleep(2)
    assert [rank.poll() for rank in ranks] == [None, None]
    ranks[1].send_signal(signal.SIGSTOP)
    said = ranks[0].communicate(timeout=30)[1]
    assert ranks[0].returncode == 75
    pattern = (
        rf"mama: rank 1 has given no sign of life for 2 s; the last: rank 1 \(\S+, pid {ranks[1].pid}\) was in step 7 "
        r"for \d s; look for a stopped process or a dead machine. Run again, it continues from its last checkpoint"
    )
    assert re.fullmatch(pattern, said.strip())
    ranks[1].kill()
    ranks[1].communicate()


@pytest.mark.ranks
def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path) -> None:
    program = tmp_path / "launcher.py"
    program.write_text(LAUNCHER)
    launcher = start(str(program), tmp_path)
    wait_for((tmp_path / "started").exists)
    launcher.kill()
    wait_for(lambda: not session(launcher))
    assert (tmp_path / "saved").exists()
    launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_workers_of_a_pool_die_with_it(number: int, tmp_path: Path) -> None:
    program = tmp_path / "pool.py"
    program.write_text(POOL)
    pool = start(str(program))
    assert pool.stdout
    pids = pool.stdout.readline().split()[2:]
    assert pids
    pool.send_signal(number)
    pool.communicate(timeout=30)  # nobody holds its output open
    wait_for(lambda: not session(pool))


@pytest.mark.parametrize("seconds", [0.3, 1.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_while_training_is_imported_is_one_line(number: int, seconds: float) -> None:
    process = start("-m", "mama", "train", "quickstart", "name=never", "runs=/nonexistent")
    wait_for(lambda: b"mama" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    wait_for(lambda: _handles(process.pid, number) or process.poll() is not None)
    time.sleep(seconds - 0.3)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (
        75,
        "mama: a signal ended it before its first step; run it again to continue\n",
    )


def _handles(pid: int, number: int) -> bool:
    """Does the process have a handler of its own for the signal? Python's for SIGINT is not yet ours."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)
