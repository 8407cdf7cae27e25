"""Consolidation: a checkpoint of a training run -> `model/`, which loads without DeepSpeed, and its towers without us."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mama.errors import ConfigError
from mama.export.model_card import add_card
from mama.export.model_folder import DTYPES, FORMAT, HEADS, ModelFacts
from mama.export.parts import TOWERS, parts
from mama.export.training_data import write_training_data
from mama.export.weight_files import write_weights
from mama.model import attention
from mama.model.mama_model import MamaModel, build
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER, read_marker
from mama.run.environment import versions
from mama.run.files import remove, replace_folder, sha256, write_digests, write_json
from mama.run.model_state import digests
from mama.run.portable import MODEL, portable, rewrite_without_paths
from mama.run.run_tokenizer import load_tokenizer
from mama.run.tensor_file import shape_of, write_tensors
from mama.settings.load import save
from mama.settings.schema import Config

CPU = torch.device("cpu")
EXACT = ("scale.log", "running_mean", "running_var")  # always fp32: logit scales, running statistics


def consolidate(config: Config, best: bool = False, dtype: Literal["fp32", "bf16"] = "fp32") -> Path:
    """Write a complete checkpoint of the run to `<run>/model/`, LoRA merged into its base in fp32; returns that folder.

    The checkpoint is the newest, or with `best` the one with the highest validation score. A kill leaves the earlier
    `model/` whole. Raises `ConfigError` if there is no such checkpoint.
    """
    run = config.run_folder
    checkpoint = _checkpoint(run, best)
    facts = ModelFacts(
        format=FORMAT,
        name=config.name,
        step=read_marker(checkpoint).step,
        steps=config.train.steps,
        checkpoint=sha256(checkpoint / MARKER),
        dtype=dtype,
        lora="merged",
        release=versions()["mama-clip"] or "unknown",
    )
    partial = run / "model.partial"
    remove(partial)
    partial.mkdir()
    _write_model(config, checkpoint, facts, partial)
    save(portable(config), partial / "config.yaml")
    write_training_data(config, partial)
    write_json(partial / MODEL, vars(facts))
    write_digests(partial)
    add_card(partial, [run / "model"])
    replace_folder(partial, run / "model")
    return run / "model"


def _write_model(config: Config, checkpoint: Path, facts: ModelFacts, folder: Path) -> None:
    tokenizer = load_tokenizer(config.run_folder)
    tokenizer.save(folder / "tokenizer")
    rewrite_without_paths(folder / "tokenizer" / "tokenizer_config.json")
    model = build(config, tokenizer, attention.choose("sdpa", CPU))
    checkpoints.load_weights(model, checkpoint, digests(model))
    model.text.merge_adapters()
    state: dict[str, Tensor] = model.state_dict()
    dtype, names = DTYPES[facts.dtype], parts(model)

    def of(part: dict[str, str]) -> dict[str, Tensor]:
        return {stored: _cast(name, state[name], dtype) for stored, name in part.items()}

    for part, own in (("vision", of(names.vision)), ("text", of(names.text))):
        (folder / part).mkdir()
        write_weights(folder / part, {name: shape_of(tensor) for name, tensor in own.items()}, own.__getitem__)
        _save_config(model, part, dtype, folder / part)
    heads = of(names.heads)
    write_tensors(folder / HEADS, {name: shape_of(t) for name, t in heads.items()}, heads.__getitem__)


def _save_config(model: MamaModel, part: str, dtype: torch.dtype, folder: Path) -> None:
    backbone = model.vision.backbone if part == TOWERS[0] else model.text.backbone
    backbone.config.dtype = dtype
    backbone.config.architectures = [type(backbone).__name__]
    backbone.config.save_pretrained(folder)
    rewrite_without_paths(folder / "config.json")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.float() if name.endswith(EXACT) else tensor.to(dtype)


def _checkpoint(run: Path, best: bool) -> Path:
    if found := checkpoints.best_whole(run) if best else checkpoints.newest(run):
        return found
    if checkpoints.checkpoints(run):
        raise ConfigError(
            f"{run}: no checkpoint has a validation score; train with train.validate_every, or leave out --best"
        )
    raise ConfigError(f"{run}: no complete checkpoint; train first")
