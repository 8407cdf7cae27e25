"""Consolidation: a checkpoint of a run -> a model folder, of which transformers reads the towers by itself.

Tensor by tensor: memory is that of the largest tensor, not that of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mama.errors import ConfigError
from mama.export.adapters import adapter_names, require_adapter, write_adapter
from mama.export.model_card import add_card
from mama.export.model_folder import DTYPES, FORMAT, HEADS, LORA, ModelFacts, is_bare, is_old
from mama.export.model_tensors import ModelTensors
from mama.export.parts import base_of
from mama.export.training_data import write_training_data
from mama.export.weight_files import write_weights
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER, read_marker
from mama.run.environment import versions
from mama.run.files import DIGESTS, named, read_object, replaced, sha256, surviving, write_digests, write_json
from mama.run.portable import MODEL, rewrite_without_paths, save_portable
from mama.run.run_folder import warn_of_other_shards
from mama.run.run_tokenizer import load_tokenizer
from mama.run.tensor_file import Shape, write_tensors
from mama.settings.checks import one_of
from mama.settings.schema import Config

EXACT = ("scale.log", "running_mean", "running_var")  # always in fp32: logit scales, running statistics
# These change when the model is evaluated, so `digests.json` does not have them.
LATER = ("README.md", "metrics.json", "calibration.json")


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


def require(config: Config, export: Export) -> None:
    """Raise `ConfigError` for what can be said before anything is read: a folder in the way, an adapter without a base.

    Only a model folder is replaced, and only if nothing else is in it.
    """
    if export.lora == "adapter":
        require_adapter(config)
    if export.out is not None:
        _require_place(config, export.out)
    folder = surviving(_place(config, export))
    if other := _other_file(folder):
        raise ConfigError(f"{folder}: holds a file that mama did not write ({other}); move it, or name another --out")


def _require_place(config: Config, out: Path) -> None:
    """Raise `ConfigError` if a model cannot be written to `out`, or not without harm."""
    folder = _place(config, Export(out=out))
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise ConfigError(f"--out: {out} is the folder that this command runs in, or above it; name another")
    for above in place.parents:
        if is_bare(above) or is_old(above) or above == (config.run_folder / "model").resolve():
            raise ConfigError(f"--out: {out} is inside of the model folder {above}; name another")
    there = surviving(folder)
    if there.exists() and not (is_bare(there) or is_old(there)) and (not there.is_dir() or any(there.iterdir())):
        raise ConfigError(f"--out: {folder} exists and is no model folder; name another")


def _other_file(folder: Path) -> str | None:
    """A file of a model folder that mama did not write; None also if nothing lists those that it wrote."""
    try:
        own = {DIGESTS, *LATER, *read_object(folder / DIGESTS)}
    except ConfigError:
        return None
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    return next((name for name in names if name.removesuffix(".part") not in own), None)


def consolidate(config: Config, export: Export | None = None) -> Path:
    """Write a whole checkpoint of the run of `config` as a model folder; returns that folder.

    A kill leaves an earlier model whole. Raises `ConfigError` if there is no such checkpoint, if its files are damaged
    or of another run, or if the model cannot be exported as `export` says.
    """
    export = export or Export()
    run = config.run_folder
    require(config, export)
    warn_of_other_shards(config)
    folder = _place(config, export)
    if export.step is not None:
        try:
            return _consolidate(config, export, folder, checkpoints.at(run, export.step))
        except checkpoints.DamagedError as error:
            raise ConfigError(f"{error}; name another step, or restore the checkpoint from a copy") from None
    found = checkpoints.best_first(run) if export.best else checkpoints.newest_first(run)
    if written := checkpoints.use_first(run, found, partial(_consolidate, config, export, folder)):
        return written
    if checkpoints.checkpoints(run):
        raise ConfigError(
            f"{run}: no checkpoint has a validation score; train with train.validate_every, or leave out --best"
        )
    raise ConfigError(f"{run}: no complete checkpoint; train first")


def _consolidate(config: Config, export: Export, folder: Path, checkpoint: Path) -> Path:
    """Write a checkpoint as a model `folder`; returns it. Raises `DamagedError`, and leaves what was there."""
    with replaced(folder) as new, checkpoints.proved(checkpoint, weights_only=True):
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
        save_portable(config, new / "config.yaml")
        write_training_data(config, new)
        digests = _write_model(config, checkpoint, export, new)
        write_json(new / MODEL, vars(facts))
        write_digests(new, digests, without=LATER)
        add_card(new, [surviving(config.run_folder / "model"), surviving(folder)])
    return folder


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
    return {stored: Shape.of(state[name], _dtype(name, dtype)) for stored, name in names.items()}


def _tensor(tensors: ModelTensors, names: dict[str, str], dtype: torch.dtype, stored: str) -> Tensor:
    return tensors.merged(names[stored]).to(_dtype(names[stored], dtype))


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(EXACT) else dtype


def _place(config: Config, export: Export) -> Path:
    """Where the model is written: a link stays, and leads to it."""
    folder = config.run_folder / "model" if export.out is None else named(export.out)
    return folder.resolve() if folder.is_symlink() else folder
