"""Consolidation: a checkpoint of a run -> a model folder, of which transformers reads the towers by itself.

Tensor by tensor: memory is that of the largest tensor, not that of the model.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mama.errors import ConfigError
from mama.export.adapters import adapter_names, require_adapter, write_adapter
from mama.export.model_card import model_card
from mama.export.model_folder import DTYPES, FORMAT, HEADS, LORA, ModelFacts, is_bare, is_old, weights_digest
from mama.export.model_tensors import ModelTensors
from mama.export.parts import base_of
from mama.export.trained_on import write_trained_on
from mama.export.weight_files import write_weights
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER, read_marker
from mama.run.environment import versions
from mama.run.files import named, read_object, remove, replace_folder, sha256, write_digests, write_json
from mama.run.portable import MODEL, portable, rewrite_without_paths
from mama.run.run_tokenizer import load_tokenizer
from mama.run.tensor_file import Shape, shape_of, write_tensors
from mama.settings.checks import one_of
from mama.settings.load import save
from mama.settings.schema import Config

EXACT = ("scale.log", "running_mean", "running_var")  # always in fp32: logit scales, running statistics
MEASURED = ("metrics.json", "calibration.json")  # what an evaluation of these weights left in the folder
LATER = ("README.md", *MEASURED)  # these change when the model is evaluated, so `digests.json` does not have them


@dataclass(frozen=True)
class Export:
    """What to consolidate, and how. Raises `ConfigError` for values that do not go together."""

    step: int | None = None  # of the checkpoint; None: the newest
    best: bool = False  # the checkpoint with the highest validation score
    dtype: str = "fp32"  # or bf16
    lora: str = "merged"  # or adapter, beside the name of its base
    largest: int | None = None  # bytes of a file of a tower; None: one file
    out: Path | None = None  # folder of the model; None: model/ in the run folder

    def __post_init__(self) -> None:
        if self.best and self.step is not None:
            raise ConfigError(f"--best: names one checkpoint and step {self.step} another; leave one of them out")
        one_of("--dtype", self.dtype, tuple(DTYPES))
        one_of("--lora", self.lora, LORA)
        if self.out is not None:
            _require_place(named(self.out))


def consolidate(config: Config, export: Export | None = None) -> Path:
    """Write a whole checkpoint of the run of `config` as a model folder; returns that folder.

    A kill leaves an earlier model whole. Raises `ConfigError` if there is no such checkpoint, if its files are damaged
    or of another run, or if the model cannot be exported as `export` says.
    """
    export = export or Export()
    run = config.run_folder
    if export.lora == "adapter":
        require_adapter(config)
    checkpoint = _checkpoint(run, export)
    facts = ModelFacts(
        format=FORMAT,
        name=config.name,
        step=read_marker(checkpoint).step,
        steps=config.train.steps,
        checkpoint=sha256(checkpoint / MARKER),
        dtype=export.dtype,
        lora=export.lora,
        release=versions()["mama-clip"] or "unknown",
    )
    folder = run / "model" if export.out is None else named(export.out)
    partial = folder.with_name(f"{folder.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    digests = _write_model(config, checkpoint, export, partial)
    _write_what_it_was_made_of(config, partial)
    write_json(partial / MODEL, vars(facts))
    write_digests(partial, digests, without=LATER)
    _keep_measured(folder, partial)
    (partial / "README.md").write_text(model_card(config, facts.step))
    replace_folder(partial, folder)
    return folder


def _write_what_it_was_made_of(config: Config, folder: Path) -> None:
    """Settings and data: what is neither weights nor the tokenizer."""
    save(portable(config), folder / "config.yaml")
    write_trained_on(config, folder)


def _keep_measured(old: Path, new: Path) -> None:
    """Take over what an evaluation found of the same weights."""
    weights = weights_digest(new)
    for name in MEASURED:
        if (old / name).is_file() and read_object(old / name).get("model") == weights:
            shutil.copyfile(old / name, new / name)


def _write_model(config: Config, checkpoint: Path, export: Export, folder: Path) -> dict[Path, str]:
    """Write tokenizer and weights; returns the digests of the files that hold weights."""
    tokenizer = load_tokenizer(config.run_folder)
    tokenizer.save(folder / "tokenizer")
    rewrite_without_paths(folder / "tokenizer" / "tokenizer_config.json")
    tensors, dtype = ModelTensors(config, tokenizer, checkpoint), DTYPES[export.dtype]
    towers = {"vision": tensors.model.vision.backbone, "text": base_of(tensors.model.text)}
    for part, backbone in towers.items():
        backbone.config.dtype, backbone.config.architectures = dtype, [type(backbone).__name__]
        backbone.config.save_pretrained(folder / part)
        rewrite_without_paths(folder / part / "config.json")
    if export.lora == "adapter":
        del towers["text"]
        text = tensors.model.text
        own = {name: tensors.read(origin) for name, origin in adapter_names(text).items()}
        write_adapter(config, text, own, tensors.base_digest(), len(tokenizer), folder / "text")
    digests: dict[Path, str] = {}
    for part in towers:
        names: dict[str, str] = getattr(tensors.names, part)
        read = partial(_tensor, tensors, names, dtype)
        digests |= write_weights(folder / part, _shapes(tensors, names, dtype), read, export.largest)
    heads = tensors.names.heads
    read = partial(_tensor, tensors, heads, dtype)
    return digests | {folder / HEADS: write_tensors(folder / HEADS, _shapes(tensors, heads, dtype), read)}


def _shapes(tensors: ModelTensors, names: dict[str, str], dtype: torch.dtype) -> dict[str, Shape]:
    state = tensors.model.state_dict()
    return {stored: shape_of(state[name], _dtype(name, dtype)) for stored, name in names.items()}


def _tensor(tensors: ModelTensors, names: dict[str, str], dtype: torch.dtype, stored: str) -> Tensor:
    return tensors.merged(names[stored]).to(_dtype(names[stored], dtype))


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(EXACT) else dtype


def _checkpoint(run: Path, export: Export) -> Path:
    if export.step is not None:
        return checkpoints.whole_at(run, export.step)
    find = checkpoints.best_whole if export.best else checkpoints.newest
    if found := find(run, weights_only=True):
        return found
    if checkpoints.checkpoints(run):
        raise ConfigError(
            f"{run}: no checkpoint has a validation score; train with train.validate_every, or leave out --best"
        )
    raise ConfigError(f"{run}: no complete checkpoint; train first")


def _require_place(folder: Path) -> None:
    """Only a model folder is replaced."""
    if not folder.exists() or is_bare(folder) or is_old(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ConfigError(f"--out: {folder} exists and is no model folder; name another")
