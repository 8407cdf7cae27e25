"""Pretrained models and tokenizers: where `vision.model` and `text.model` lie, and reading them in one-line errors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mama.settings.schema import ConfigError
from shards.errors import one_line


def locate(field: str, model: str) -> tuple[str, dict[str, Any]]:
    """Arguments of transformers' `from_pretrained` for a hub name, a folder, a GGUF file, or
    `package:NAME/FILE.gguf`, a GGUF file inside an installed Python package."""
    if model.startswith("package:"):
        package, _, file = model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{field}: the Python package {package} is not installed; see the head of the recipe")
        model = str(Path(spec.submodule_search_locations[0]) / file)
    model = os.path.expanduser(model)
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise ConfigError(f"{field}: {path}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    return model, {}


@contextmanager
def in_one_line(what: str, fix: str = "") -> Iterator[None]:
    """Whatever transformers raises while it reads files becomes a `ConfigError` from `what` is read to its `fix`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of many types, where the files hold something else than it expects
        raise ConfigError(f"{what} cannot be loaded: {_reason(error)}{fix and f'; {fix}'}") from error


def _reason(error: Exception) -> str:
    """The first sentence of an error, which may go on for many lines."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return "it brings Python code of its own, which is never run; convert it to an architecture of transformers"
    told = isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError)
    return (text if told else f"{type(error).__name__}, {text}").partition(". ")[0][:200]
