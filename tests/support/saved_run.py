"""A run folder as training leaves it, made without DeepSpeed, and the files of its evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mama.model.mama_model import build
from mama.run.model_state import buffers, digests, trained
from mama.run.run_folder import prepare
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.schema import Config, EvalConfig
from tests.support.checkpoint_folder import saved
from tests.support.cohort import write_shards
from tests.support.tiny_run import config_of


def small_run(folder: Path, val: int = 0) -> Config:
    """Shards below `folder` of 18 images to train on and 14 to test on, and a run of the tiny model with a checkpoint.

    Its evaluation has 9 batches of training images, 7 of test images and 2 of findings. `val` patients are in a split
    of that name.
    """
    write_shards(folder / "shards", {"train": 9, "test": 7} | ({"val": val} if val else {}))
    config = config_of(folder, "small")
    tasks = ["cancer", "malignancy", "birads", "density"]
    config = replace(
        config,
        eval=EvalConfig(tasks=tasks, batch=2, bootstrap=20, intensity_baseline=True),
        text=replace(config.text, config=config.text.config | {"n_positions": 256}),
        data=replace(config.data, workers=0, max_tokens=200),
    )
    save_run(config)
    return config


def results_of(config: Config) -> dict[str, bytes]:
    """Every file of a run's evaluations, by its path in the run folder."""
    folders = (config.run_folder / name for name in ("eval", "eval-on"))
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(config.run_folder)): path.read_bytes() for path in found}


def save_run(config: Config, step: int = 3) -> None:
    """The run folder of `config`, with one checkpoint whose trained weights are away from their first values."""
    prepare(config)
    model = build(config, load_tokenizer(config.run_folder), "mama_sdpa")
    random = torch.Generator().manual_seed(step)  # weights of its own for each step
    weights = {
        f"weight/{name}": (p + 0.1 * torch.randn(p.shape, generator=random)).detach()
        for name, p in trained(model).items()
    }
    running = {f"buffer/{name}": tensor for name, tensor in buffers(model).items()}
    saved(config.run_folder, step, tensors=weights | running, frozen=digests(model))
