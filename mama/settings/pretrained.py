"""Pretrained models and tokenizers: resolve `vision.model` and `text.model`, and report loading errors in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mama.errors import ConfigError
from shards.errors import one_line
from shards.files import PACKAGE, package_path


def locate(field: str, model: str) -> tuple[str, dict[str, Any]]:
    """Arguments of transformers' `from_pretrained` for the value `model` of a setting `field`.

    `model` is a hub name, a folder, a GGUF file, or `package:NAME/FILE.gguf`, a GGUF file in an installed Python
    package. Raises `ConfigError` if the package is not installed or the file does not exist.
    """
    if model.startswith(PACKAGE):
        path = package_path(model)
        if path is None:
            package = model.removeprefix(PACKAGE).partition("/")[0]
            raise ConfigError(f"{field}: the Python package {package} is not installed; see the head of the recipe")
        model = str(path)
    model = os.path.expanduser(model)
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise ConfigError(f"{field}: {path}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    return model, {}


@contextmanager
def loading_errors(subject: str, fix: str = "") -> Iterator[None]:
    """Turn whatever transformers raises while it loads `subject` into a one-line `ConfigError` that ends in `fix`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many types for files that it does not expect
        raise ConfigError(f"{subject} cannot be loaded: {_reason(error)}{fix and f'; {fix}'}") from error


def _reason(error: Exception) -> str:
    """The first sentence of an error message, at most 200 characters; with its type where the message needs it."""
    text = one_line(error)
    if "trust_remote_code" in text:
        return "it brings Python code of its own, which is never run; convert it to an architecture of transformers"
    explains = isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError)
    return (text if explains else f"{type(error).__name__}, {text}").partition(". ")[0][:200]
