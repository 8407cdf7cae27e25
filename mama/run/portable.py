"""Settings without paths: a model that leaves this machine keeps the names of files and folders, not their places."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mama.settings.load import yaml_of
from mama.settings.schema import TASKS, Config, EvalConfig
from shards.files import atomic_write

MODEL = "model.json"  # the file of a model folder without which it is none
OLD_WEIGHTS = "model.safetensors"  # that of the model folders of earlier releases

PLACE = re.compile(r"(~|/|[A-Za-z]:[\\/]|[a-z]+://).*[\\/]")  # the beginning of a path or URL; a lone "/" is a token


def portable(config: Config) -> Config:
    """Return the settings of a model with names in place of paths and URLs.

    What it was evaluated on is left out, and so are tasks of one's own, which are files.
    """
    data = replace(config.data, shards=[folder_name(address) for address in config.data.shards])
    vision = replace(config.vision, model=_model_name(config.vision.model), config=without_paths(config.vision.config))
    text = replace(config.text, model=_model_name(config.text.model), config=without_paths(config.text.config))
    tasks = [name for name in config.eval.tasks if name in TASKS] or EvalConfig().tasks
    measured = replace(config.eval, on=[], boxes=[], tasks=tasks)
    return replace(config, data=data, vision=vision, text=text, eval=measured)


def save_portable(config: Config, path: Path) -> None:
    """Write the settings of a model so that `load(path)` returns them, with defaults for what is of this machine.

    That is left out: where things lie, and packing, which `preprocessing.json` describes.
    """
    values = asdict(portable(config))
    del values["runs"], values["pack"], values["data"]["cache"]
    atomic_write(path, yaml_of(values).encode())


def folder_name(address: str) -> str:
    """Return the last part of a folder's path, or of an http(s) URL without its query."""
    if "://" in address:
        return Path(urlsplit(address).path).name or "shards"
    return Path(os.path.expanduser(address)).resolve().name


def without_paths(value: Any) -> Any:
    """Replace every absolute path or URL in a JSON document by its last part."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and PLACE.match(value) and "\n" not in value:
        return folder_name(value) if "://" in value else re.split(r"[\\/]+", value.rstrip("\\/"))[-1]
    return value


def rewrite_without_paths(file: Path) -> None:
    """Apply `without_paths` to a JSON file written by a library, if it exists."""
    if file.exists():
        file.write_text(json.dumps(without_paths(json.loads(file.read_text())), indent=2, ensure_ascii=False) + "\n")


def _model_name(model: str | None) -> str | None:
    """The name of a local folder or file; a hub name stays as it is."""
    if model is None or model.startswith("package:"):
        return model
    is_local = PLACE.match(model) or Path(model).is_absolute() or os.path.exists(os.path.expanduser(model))
    return folder_name(model) if is_local else model
