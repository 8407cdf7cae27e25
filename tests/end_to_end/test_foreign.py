"""Models and tokenizers of strangers: nothing of theirs is run, and what they claim is checked before it is built."""

from __future__ import annotations

import ast
import builtins
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel

from mama.data import tokenizer as tokens
from mama.errors import ConfigError
from mama.model.backbones import build_backbone
from mama.model.text_tower import build_text
from mama.model.vision_tower import build_vision
from mama.settings.schema import TextConfig, VisionConfig
from mama.train import estimate
from tests.support.checkout import CHECKOUT
from tests.support.tiny_backbones import KERNEL, TEXT, VISION
from tests.support.word_tokenizer import tokenizer

CODE = """
from pathlib import Path
from transformers import PretrainedConfig as Config, PreTrainedModel as Model, PreTrainedTokenizerFast as Words
(Path(__file__).parent / "ran").touch()
"""
OWN_CODE = {"AutoConfig": "code.Config", "AutoModel": "code.Model", "AutoTokenizer": ["code.Words", "code.Words"]}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    AutoModel.from_config(AutoConfig.for_model(**TEXT["gpt2"])).save_pretrained(folder)
    tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    AutoModel.from_config(AutoConfig.for_model(**VISION["dinov2"])).save_pretrained(folder)
    return folder


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a folder of transformers that a user names."""
    return {
        "vision": lambda: build_vision(VisionConfig(model=str(folder)), KERNEL),
        "text": lambda: build_text(TextConfig(model=str(folder), tune="full"), tokenizer(), KERNEL),
        "tokenizer": lambda: tokens.pretrained(str(folder), {}),
        "run": lambda: tokens.Tokenizer.load(folder),
        "dry run": lambda: estimate._published("text.model", str(folder)),
    }


@pytest.mark.parametrize("known", [True, False])
def test_code_that_a_model_brings_is_never_run_and_nobody_is_asked(
    text_model: Path, vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    asked: list[str] = []

    def yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for model, used in ((vision_model, {"vision"}), (text_model, {"text", "tokenizer", "run", "dry run"})):
        folder = Path(shutil.copytree(model, tmp_path / model.name))
        (folder / "code.py").write_text(CODE)
        changed(folder / "config.json", auto_map=OWN_CODE, **({} if known else {"model_type": "own"}))
        if (words := folder / "tokenizer_config.json").exists():
            changed(words, auto_map=OWN_CODE, **({} if known else {"tokenizer_class": "OwnTokenizer"}))
        for name, read in readers(folder).items():
            if name not in used:
                continue
            if known:
                read()  # by the code of transformers for this architecture
            else:
                with pytest.raises(ConfigError, match=r"^[^\n]*Python code of its own, which is never run[^\n]*$"):
                    read()
    assert not asked
    assert not list(tmp_path.rglob("ran"))


def test_every_call_that_could_run_foreign_code_forbids_it() -> None:
    calls = []
    for path in [path for room in ("mama", "shards", "slurm") for path in (CHECKOUT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                calls.append((f"{path.relative_to(CHECKOUT)}:{node.lineno}", said.get("trust_remote_code")))
    assert len(calls) >= 7
    assert [place for place, said in calls if said != "False"] == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((name, value) for name in ("n_layer", "n_embd", "vocab_size") for value in (2**70, 2**30, -1, 0, "x", None)),
        ("n_positions", 2**70),
        ("n_head", 0),
        ("activation_function", "os.system"),
        ("model_type", ["gpt2"]),
    ],
)
def test_a_shape_that_nobody_can_build_is_one_line_at_once(
    text_model: Path, tmp_path: Path, setting: str, value: object
) -> None:
    shutil.copytree(text_model, tmp_path, dirs_exist_ok=True)
    changed(tmp_path / "config.json", **{setting: value})
    with pytest.raises(ConfigError, match=r"^text[^\n]+$"):
        readers(tmp_path)["text"]()
    shape = {"model_type": "gpt2", "n_layer": 2**30}
    with pytest.raises(ConfigError, match=r"^text: num_hidden_layers is 1073741824, not an integer from 0 to 1000$"):
        build_backbone("text", TextConfig(None, shape), ["gpt2"], KERNEL)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "5", "null", "[]", "[" * 100_000, '{"a":' * 100_000, "\xff", "pipe"])
def test_a_file_of_another_kind_is_one_line(text_model: Path, tmp_path: Path, file: str, content: str) -> None:
    shutil.copytree(text_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    if content == "pipe":
        os.mkfifo(tmp_path / file)  # transformers passes over it
    else:
        (tmp_path / file).write_bytes(content.encode("latin-1"))
    for name in ("text", "tokenizer", "run", "dry run"):
        said = ""
        try:
            readers(tmp_path)[name]()
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said
