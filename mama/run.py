"""The run folder: `runs/<name>/` holds everything that a run was told and everything it wrote."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mama import checkpoint, prompt, tokens
from mama.config import Config, ConfigError
from mama.images import Images
from mama.loading import load, save
from mama.pretrained import locate
from mama.tokens import Tokenizer

log = logging.getLogger(__name__)

STACK = ("mama-clip", "torch", "deepspeed", "transformers", "peft", "xformers", "webdataset", "pydicom", "numpy")
# What may differ between the first start of a run and its resume. Ranks and micro-batches decide how many
# negatives a pair has, unless train.grad_cache takes them from the whole step: that is told.
MAY_CHANGE = (
    *("pack", "eval", "runs", "data.workers", "data.cache", "data.max_corrupt"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.validate_every", "train.max_skips"),
    *("train.ranks", "train.micro_batch", "train.zero_stage", "train.offload"),
    *("train.attention", "train.activation_checkpointing"),
)


def prepare(config: Config) -> Path:
    """Write into the run folder what a run is told; where it has a checkpoint, check that it was told the same.

    A run that failed before its first checkpoint begins anew, with a configuration that may be mended.
    """
    run = config.run_folder
    if checkpoint.checkpoints(run):
        _refuse_other(config, run)
    else:
        tokenizer = make_tokenizer(config)
        shutil.rmtree(run / "tokenizer", ignore_errors=True)
        tokenizer.save(run / "tokenizer")
        save(config, run / "config.yaml")
    write_json(run / "environment.json", environment())
    return run


def make_tokenizer(config: Config) -> Tokenizer:
    """The language model's own, or for a random language model one learned from the training reports."""
    if config.text.model is not None:
        name, arguments = locate("text.model", config.text.model)
        return tokens.pretrained(name, arguments)
    images, style = Images(config.data, "train"), config.data.style
    studies = (images.study(n) for n in range(len(images.studies)))
    texts = (s for study in studies for view in study.views for s in prompt.text(study, view, style))
    return tokens.learn(texts, int(config.text.config.get("vocab_size", 2048)))


def environment() -> dict[str, Any]:
    """Versions of the stack and, in a checkout, the git commit."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    in_checkout = git.returncode == 0 and (root / "pyproject.toml").exists()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git.stdout.strip() if in_checkout else None,
        "versions": {name: _version(name) for name in STACK},
    }


def write_json(path: Path, document: Any) -> None:
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    aside.rename(path)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _refuse_other(config: Config, run: Path) -> None:
    known = load(run / "config.yaml")
    if known.contrastive_batch != config.contrastive_batch:
        log.warning(
            "%s was started with %d pairs in a contrastive batch, this run has %d: fewer or more negatives for each",
            *(run, known.contrastive_batch, config.contrastive_batch),
        )
    before, now = _flat(asdict(known)), _flat(asdict(config))
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(MAY_CHANGE) or before.get(key) == now.get(key):
            continue
        raise ConfigError(
            f"{key}: {now.get(key)!r}, but {run} was started with {before.get(key)!r}; "
            f"give the run another name=... or the value it had"
        )


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
