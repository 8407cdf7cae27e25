"""Before weights are loaded: which node is to blame for what, and two ranks that see different disks."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mama.errors import ConfigError, TrainingError
from mama.runtime.collectives import rank
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, DataConfig
from mama.train import node_facts, start_check
from mama.train.node_facts import Facts
from mama.train.start_check import Verdict, verdict
from slurm import rank_environment
from slurm.profile import SlurmError
from tests.support.cohort import SIZE, write_shards
from tests.support.tiny_model import tiny

SEES = {"runs/a": ("a new file", True), "data.shards x": ("0123", True), "version of torch": ("2.10", True)}


def facts(node: str, problem: str = "", free: float = 0.99, lr: str = "0.1", **sees: tuple[str, bool]) -> Facts:
    files = {"run": "runs/a", "shards": "data.shards x", "torch": "version of torch"}
    return Facts(node, problem, free, {"optim.lr": lr}, SEES | {files[name]: value for name, value in sees.items()})


GONE = ("No such file or directory", False)
UNSEEN = ("no file that is new there", False)
CASES: dict[str, tuple[list[Facts], str, str]] = {  # what the ranks find -> the message's beginning, the bad node
    "all is well": ([facts("a"), facts("b", free=0.9)], "$", ""),
    "a GPU that is broken": ([facts("a"), facts("b", "its device does not work: ECC")], "rank 1 on b: its dev", "b"),
    "on rank 0": ([facts("a", "its device does not work: ECC"), facts("b")], "rank 0 on a: its device", "a"),
    "on every node": ([facts("a", "no driver"), facts("b", "no driver")], "rank 0 on a: no driver", ""),
    "one of two GPUs on the only node": ([facts("a"), facts("a", "ECC")], "rank 1 on a: ECC", "a"),
    "a GPU in use": ([facts("a"), facts("a", free=0.4), facts("b")], "rank 1 on a: only 40% of its GPU's mem", "a"),
    "GPUs that all share": ([facts("a", free=0.4), facts("b", free=0.3)], "$", ""),
    "other settings": ([facts("a"), facts("b", lr="0.2")], "optim.lr: rank 1 on b has 0.2, rank 0 on a 0.1;", ""),
    "a disk that is not mounted": (
        [facts("a"), facts("b"), facts("c", shards=GONE)],
        "data.shards x: rank 2 on c sees No such file or directory, rank 0 on a 0123;",
        "c",
    ),
    "on rank 0 of two": (
        [facts("a", shards=GONE), facts("b")],
        "data.shards x: rank 0 on a sees No such file or directory, rank 1 on b 0123;",
        "a",
    ),
    "a folder that nobody has": ([facts("a", shards=GONE), facts("b", shards=GONE)], "$", ""),  # `prepare` says so
    "other shards": ([facts("a"), facts("b", shards=("4567", True))], "data.shards x: rank 1 on b sees 4567, ", "b"),
    "of which most have the right ones": (
        [facts("a", shards=("4567", True)), facts("b"), facts("c")],
        "data.shards x: rank 0 on a sees 4567, rank 1 on b 0123;",
        "a",
    ),
    "ranks are not nodes": (
        [facts("a"), facts("a"), facts("a"), facts("b", torch=("2.9", True)), facts("c", torch=("2.9", True))],
        "version of torch: rank 0 on a sees 2.10, rank 3 on b 2.9;",
        "a",
    ),
    "a run folder on a disk of its own": (
        [facts("a"), *(facts(node, run=UNSEEN) for node in "bcd")],
        "runs/a: rank 1 on b sees no file that is new there, rank 0 on a a new file;",
        "",
    ),
    "a run folder that one node lacks": (
        [facts("a"), facts("b", run=UNSEEN), facts("c")],
        "runs/a: rank 1 on b sees no file that is new there",
        "b",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_node_that_is_to_blame_is_named(case: str) -> None:
    found, message, node = CASES[case]
    judged = verdict(found)
    assert re.match(message if message == "$" else re.escape(message), judged.message), judged.message
    assert judged.node == node
    assert "\n" not in judged.message


def test_a_rank_that_does_not_answer_is_named() -> None:
    assert start_check._late([1], ["a", "b"]).node == "b"
    assert start_check._late([2, 3], ["a", "b", "c", "c"]).node == "c"
    assert start_check._late([1, 2], ["a", "b", "c"]).node == "", "no node answers"


def test_a_job_leaves_a_bad_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank on a good node asks for it, and the others must not end before; that it is once, is the job's affair."""
    said: list[str] = []
    answers = iter((True, False, SlurmError("Slurm refuses"), True))

    def leave(node: str) -> bool:
        said.append(node)
        answer = next(answers)
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(start_check.time, "sleep", lambda seconds: said.append("waited"))
    monkeypatch.setattr(rank_environment, "exclude_node_and_requeue", leave, raising=False)
    bad, nodes = Verdict("rank 1 on b: ECC", "b"), ["a", "b"]
    with pytest.raises(SystemExit) as end:
        start_check._act(bad, nodes, 0)
    assert end.value.code == 75
    for number in (0, 0, 1):
        with pytest.raises(TrainingError, match=r"^rank 1 on b: ECC$"):
            start_check._act(bad, nodes, number)
    assert said == ["b", "b", "b", "waited"]
    with pytest.raises(SystemExit):
        start_check._act(Verdict("rank 0 on a: ECC", "a"), nodes, 1)
    assert said.pop() == "a"
    with pytest.raises(ConfigError, match="no shards"):
        start_check._act(Verdict("no shards"), nodes, 0)
    assert len(said) == 4, "a mistake is the same on every node"


RUN = Path("runs/run")


def other_shards() -> None:
    file = Path("shards/manifest.json")
    file.write_text(file.read_text().replace("invented", "renamed"))


def no_shards() -> None:
    Path("shards/manifest.json").unlink()


def own_run_folder() -> None:
    RUN.unlink()
    (RUN / "alive").mkdir(parents=True)


# What is other on rank 1 -> the beginning of what both say; None: nothing.
DISKS: list[tuple[Callable[[], object], str | None]] = [
    (int, None),
    (other_shards, r"data\.shards shards: rank 1 on b sees [0-9a-f]{12}, rank 0 on a \S{12}; start all"),
    (no_shards, r"data\.shards shards: rank 1 on b sees No such file or directory, rank 0 on a \S{12}; start"),
    (own_run_folder, r"runs/run: rank 1 on b sees no file that is new there \(after 2 s\), rank 0 on a a new file"),
]


def see(config: Config) -> list[str]:
    """What both ranks come to in each case, with other settings, and without room for a checkpoint."""
    from mama.train.deepspeed_engine import join_ranks

    os.environ["SLURMD_NODENAME"] = "ab"[rank_number := int(os.environ["RANK"])]
    disk, config = Path(config.runs), replace(config, runs="runs")
    met = start_check.meet(60)
    found = []
    for number, (change, _) in enumerate(DISKS):
        own_disk(disk)
        if rank_number == 1:
            change()
        found.append(outcome(config, met, number, rank_number))
    own_disk(disk)
    other = replace(config, data=replace(config.data, workers=rank_number, max_tokens=64 - rank_number))
    found.append(outcome(other, met, 10, rank_number))
    with patch.object(start_check.shutil, "disk_usage", return_value=shutil._ntuple_diskusage(1, 1, 0)):
        found.append(outcome(config, met, 11, rank_number))
    join_ranks()
    device = torch.device("cpu")
    start_check.check_sum(met, rank(), 2, device)
    if rank() == 1:
        torch.distributed.all_reduce(torch.ones(2**18))  # which spoils the sum
    else:
        try:
            start_check.check_sum(torch.distributed.PrefixStore("again", met), 0, 1, device)
        except TrainingError as error:
            found.append(str(error))
    return found


def own_disk(disk: Path) -> None:
    """Shards for each rank alone, and one run folder for both; the rank works there."""
    place = Path(tempfile.mkdtemp(dir=disk.parent)) / "disk"
    shutil.copytree(disk, place)
    (place / "runs").mkdir()
    (place / RUN).symlink_to(disk.parent / "run")
    os.chdir(place)


def outcome(config: Config, store: torch.distributed.Store, number: int, own: int) -> str:
    try:
        with patch.object(node_facts, "VISIBLE", 2.0):
            start_check.check_nodes(config, torch.distributed.PrefixStore(str(number), store), own, 2, lambda: None)
        return ""
    except (ConfigError, TrainingError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.ranks
def test_ranks_that_see_different_files_end_in_one_line(tmp_path: Path) -> None:
    write_shards(tmp_path / "disk" / "shards", {"train": 4})
    (tmp_path / "run" / "alive").mkdir(parents=True)
    base = tiny(2)
    data = DataConfig(shards=["shards"], image_size=SIZE, max_tokens=64, workers=0)
    *found, settings, full, wrong = run_on_ranks(see, replace(base, name="run", runs=str(tmp_path / "disk"), data=data))
    for said, (change, expected) in zip(found, DISKS, strict=True):
        assert re.match(f"TrainingError {expected}" if expected else "$", said), (change, said)
        assert "\n" not in said
    assert settings.startswith("ConfigError data.max_tokens: rank 1 on b has 63, rank 0 on a 64; start all"), settings
    assert re.match(r"ConfigError runs: runs/run has 0\.0 GiB free, and a checkpoint takes 0\.\d GiB; free", full), full
    assert wrong == "rank 0 on a: an all-reduce gave a wrong sum; look at its device and network"
    assert list((tmp_path / "run" / "alive").iterdir()) == []
