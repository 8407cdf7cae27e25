"""Consolidation: a checkpoint of ZeRO partitions -> `model/`, safetensors and JSON that load without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch

from mama.errors import ConfigError
from mama.export.model_card import model_card
from mama.export.trained_on import write_trained_on
from mama.model import attention
from mama.model.mama_model import build
from mama.run import checkpoints
from mama.run.checkpoint_marker import OF_MODEL, read_marker
from mama.run.files import remove, replace_folder, write_digests
from mama.run.model_state import digests
from mama.run.portable import WEIGHTS, portable, rewrite_without_paths
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.load import save
from mama.settings.schema import Config

CPU = torch.device("cpu")


def consolidate(config: Config, best: bool = False) -> Path:
    """Write a complete checkpoint of the run to `<run>/model/`, LoRA merged into its base in fp32; returns that folder.

    The checkpoint is the newest, or with `best` the one with the highest validation score. A kill leaves the earlier
    `model/` whole. Raises `ConfigError` if there is no such checkpoint.
    """
    run = config.run_folder
    checkpoint = _checkpoint(run, best)
    tokenizer = load_tokenizer(run)
    model = build(config, tokenizer, attention.choose("sdpa", CPU))
    checkpoints.load_weights(model, checkpoint, digests(model))
    model.text.merge_adapters()
    partial = run / "model.partial"
    remove(partial)
    partial.mkdir()
    step = read_marker(checkpoint).step
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    checkpoints.save_tensors(tensors, partial / WEIGHTS, {"step": str(step)})
    model.vision.backbone.config.save_pretrained(partial / "vision")
    model.text.backbone.config.save_pretrained(partial / "text")
    tokenizer.save(partial / "tokenizer")
    for name in ("vision/config.json", "text/config.json", "tokenizer/tokenizer_config.json"):
        rewrite_without_paths(partial / name)
    save(portable(config), partial / "config.yaml")
    (partial / "README.md").write_text(model_card(config, step))
    write_trained_on(config, partial)
    write_digests(partial)
    replace_folder(partial, run / "model")
    return run / "model"


def _checkpoint(run: Path, best: bool) -> Path:
    if found := checkpoints.best_whole(run, OF_MODEL) if best else checkpoints.newest(run, OF_MODEL):
        return found
    if checkpoints.checkpoints(run):
        raise ConfigError(
            f"{run}: no checkpoint has a validation score; train with train.validate_every, or leave out --best"
        )
    raise ConfigError(f"{run}: no complete checkpoint; train first")
