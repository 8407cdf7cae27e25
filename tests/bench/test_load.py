"""The benchmark of loading runs and its pictures are what it says; the figures themselves are not tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mama.bench import load
from shards.check.check import check
from shards.read.reader import ShardReader


def test_the_benchmark_loads_what_it_says(tmp_path: Path) -> None:
    size = load._write_shards(tmp_path / "shards")
    assert check(tmp_path / "shards") == []
    assert 70_000 < size < 90_000, "a real mammogram of 1,024 pixels has some 80 kB"
    reader = ShardReader(tmp_path / "shards", "train")
    assert reader.image(0, 0).shape == load.STORED
    assert reader.view_counts == [4] * load.STUDIES


def test_every_line_has_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STUDIES": 4, "PICTURES": 2, "MICRO_BATCH": 3, "BATCHES": 2}.items():
        monkeypatch.setattr(load, name, value)
    head, rule, *lines = load.bench_load(rounds=1)
    assert head.startswith("| 1,024 x 448 JPEG of ")
    assert rule == "|---|---|"
    assert [re.sub(r"[\d.]+ \|$", "", line) for line in lines] == [
        "| pairs/s and core | ",
        "| a report written and tokenised, µs | ",
        "| a view augmented on the CPU, ms | ",
        "| pairs/s through a loader with one worker | ",
    ]
    assert all(float(line.split("|")[2]) > 0 for line in lines)
