"""Plans and records of a build that hold JSON of other types are told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.errors import ShardError
from shards.pack.plan import PLAN, Plan, PlannedShard, load_plan, save_plan
from shards.pack.sample import Refusal
from shards.pack.shard_record import Record, load_record, save_record
from shards.read.manifest import Shard

NAME = "train-000000.tar"
SHARD = Shard(NAME, "train", 1, 1024, "0" * 64, ("k",), ("p",), (2,), (0,))
RECORD = Record(SHARD, 3, 2, 0, {"train": {"view": {"L-CC": 2}}}, {}, (Refusal("a", "blank", "b"),), ("i",))
WHOLE = ["", "null", "[]", '"done"', "2", "{}", "[" * 100_000]
EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d.update(images="2"),
    lambda d: d.update(listed=3.0),
    lambda d: d.update(studies_dropped=True),
    lambda d: d.update(labels=[]),
    lambda d: d["labels"]["train"]["view"].update({"L-CC": "2"}),
    lambda d: d["shard"].update(offsets=["0"]),
    lambda d: d["shard"].update(keys="k"),
    lambda d: d.update(shard=None),
    lambda d: d.update(refusals=[None]),
    lambda d: d.update(more=1),
    lambda d: d.pop("instances"),
]


@pytest.mark.parametrize("change", [*EDITS, *WHOLE])
def test_a_record_of_other_types_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object] | str) -> None:
    save_record(RECORD, tmp_path)
    assert load_record(tmp_path, NAME) == RECORD
    edit(tmp_path / "train-000000.json", change)
    line = rf"^{tmp_path}/train-000000\.json: was edited or damaged [^\n]+; remove it and run the same `mama pack`"
    with pytest.raises(ShardError, match=line):
        load_record(tmp_path, NAME)


PLAN_EDITS: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d.update(settings=[]),
    lambda d: d.update(versions={"numpy": 2}),
    lambda d: d.update(shards={"a": 1}),
    lambda d: d["shards"][0].update(name=1),
    lambda d: d["shards"][0].update(studies=[["k", 1]]),
    lambda d: d["shards"][0].update(studies="kd"),
    lambda d: d.pop("settings"),
]


@pytest.mark.parametrize("change", [*PLAN_EDITS, *WHOLE])
def test_a_plan_of_other_types_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object] | str) -> None:
    plan = Plan({"source": "s"}, {"numpy": "2"}, (PlannedShard(NAME, "train", (("k", "d"),)),))
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path) == plan
    edit(tmp_path / PLAN, change)
    fix = r"([^\n]+; restore it from a copy, or [^\n]+|was written by another release; give another `out`)$"
    with pytest.raises(ShardError, match=rf"^{tmp_path}/{PLAN}: {fix}"):
        load_plan(tmp_path)


def edit(path: Path, change: Callable[[dict[str, Any]], object] | str) -> None:
    if isinstance(change, str):
        path.write_text(change)
        return
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
