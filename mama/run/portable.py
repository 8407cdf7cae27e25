"""What leaves this machine names files and folders, and does not say where they lie."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mama.settings.schema import Config, DataConfig
from shards.pack.settings import PackConfig

PLACE = re.compile(r"(~|/|[A-Za-z]:[\\/]|[a-z]+://).*[\\/]")  # how a path or an address begins: a lone "/" is a token


def portable(config: Config) -> Config:
    """The same model and texts, with names in place of paths and addresses, and of the archive only its source."""
    data = replace(
        config.data, shards=[folder_name(address) for address in config.data.shards], cache=DataConfig().cache
    )
    vision = replace(config.vision, model=_model_name(config.vision.model), config=without_paths(config.vision.config))
    text = replace(config.text, model=_model_name(config.text.model), config=without_paths(config.text.config))
    pack = PackConfig(source=config.pack.source)
    return replace(config, runs=Config().runs, data=data, vision=vision, text=text, pack=pack)


def folder_name(address: str) -> str:
    """The last part of a folder's path, or of an http(s) address without what may stand behind it."""
    if "://" in address:
        return Path(urlsplit(address).path).name or "shards"
    return Path(os.path.expanduser(address)).resolve().name


def without_paths(value: Any) -> Any:
    """A JSON document with the last part of every absolute path or address in it."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and PLACE.match(value) and "\n" not in value:
        return folder_name(value) if "://" in value else re.split(r"[\\/]+", value.rstrip("\\/"))[-1]
    return value


def rewrite_without_paths(file: Path) -> None:
    """A configuration that a library has written; a file that is not there stays so."""
    if file.exists():
        file.write_text(json.dumps(without_paths(json.loads(file.read_text())), indent=2, ensure_ascii=False) + "\n")


def _model_name(model: str | None) -> str | None:
    """A hub name stays; of a folder or file here the name is left."""
    if model is None or model.startswith("package:"):
        return model
    return (
        folder_name(model)
        if PLACE.match(model) or Path(model).is_absolute() or os.path.exists(os.path.expanduser(model))
        else model
    )
