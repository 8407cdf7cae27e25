"""A checkpoint of ZeRO's pieces -> `model/`: safetensors and JSON that load without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from mama.data.tokenizer import Tokenizer
from mama.model import attention
from mama.model.mama_model import MamaModel, build
from mama.model.towers import TextTower, VisionTower
from mama.run import checkpoints
from mama.run.digests import check_digests, write_digests
from mama.run.folders import remove, replace_folder, standing
from mama.run.model_state import digests
from mama.run.portable import portable, rewrite_without_paths
from mama.run.run_tokenizer import load_tokenizer
from mama.settings.load import load, save
from mama.settings.schema import Config, ConfigError
from shards.read.reader import load_manifest
from shards.read.remote import local_folder

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


def consolidate(config: Config, best: bool = False) -> Path:
    """Write the newest complete checkpoint of the run to `<run>/model/`, LoRA merged into its base in fp32.

    With `best` it is the one with the highest validation score.
    """
    run = config.run_folder
    chosen = checkpoints.best_whole(run) if best else checkpoints.newest(run)
    if chosen is None and checkpoints.checkpoints(run):
        raise ConfigError(f"{run}: no checkpoint was validated; train with train.validate_every, or take the newest")
    if chosen is None:
        raise ConfigError(f"{run}: no complete checkpoint; train first")
    tokenizer = load_tokenizer(run)
    model = build(config, tokenizer, attention.choose("sdpa", CPU))
    checkpoints.load_weights(model, chosen, digests(model))
    model.text.merge_adapters()
    aside = run / "model.partial"
    remove(aside)
    aside.mkdir()
    step = checkpoints.step_of(chosen)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    checkpoints.save_tensors(tensors, aside / WEIGHTS, {"step": str(step)})
    model.vision.backbone.config.save_pretrained(aside / "vision")
    model.text.backbone.config.save_pretrained(aside / "text")
    tokenizer.save(aside / "tokenizer")
    for written in ("vision/config.json", "text/config.json", "tokenizer/tokenizer_config.json"):
        rewrite_without_paths(aside / written)
    save(portable(config), aside / "config.yaml")
    (aside / "README.md").write_text(model_card(config, step))
    write_digests(aside)
    replace_folder(aside, run / "model")
    return run / "model"


def load_model(folder: Path, device: torch.device) -> tuple[MamaModel, Tokenizer]:
    """A consolidated model, ready to embed, and its tokenizer.

    Raises `ConfigError` where there is none, or a file is not the one that was written.
    """
    folder = standing(folder)
    if not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent}: no such run folder; train first")
    if not (folder / WEIGHTS).exists():
        raise ConfigError(f"{folder}: no {WEIGHTS}; run `mama consolidate` first")
    check_digests(folder, "run `mama consolidate` again")
    config = load(folder / "config.yaml")
    kernel = attention.choose(config.train.attention, device)
    vision, text = (
        AutoModel.from_config(
            AutoConfig.from_pretrained(folder / part, trust_remote_code=False),
            attn_implementation=kernel,
            trust_remote_code=False,
        )
        for part in ("vision", "text")
    )
    model = MamaModel(VisionTower(vision), TextTower(text, text.config.hidden_size), config.heads, config.loss)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(device).eval(), Tokenizer.load(folder / "tokenizer")


def model_card(config: Config, step: int) -> str:
    """What the model is and what it was trained on: its licence goes with it."""
    lines = [
        f"# {config.name}",
        "",
        f"MaMA image-text model after {step} of {config.train.steps} steps.",
        "",
        "Trained on:",
        "",
    ]
    named = portable(config)
    for folder in config.data.shards:
        manifest = load_manifest(local_folder(folder, config.data.cache_folder))
        lines.append(f"- `{manifest.source}` ({sum(s.samples for s in manifest.shards if s.split == 'train')} studies)")
    lines += [
        "",
        "The licence of these data decides whether this model may leave your site; EMBED's, for example, forbids it.",
        "Not for clinical use.",
        "",
        "```json",
        json.dumps({"image_size": list(config.data.image_size), "seed": config.seed, "vision": named.vision.model,
                    "text": named.text.model}, indent=2),
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
