"""The model folder that `mama consolidate` writes: load it for inference, without DeepSpeed or peft."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.export.adapters import BASE, load_adapted
from mama.export.parts import parts, vision_names
from mama.export.trained_on import TRAINED_ON
from mama.export.weight_files import AGAIN, fill, weights_in
from mama.model import attention
from mama.model.mama_model import MamaModel
from mama.model.text_tower import TextTower
from mama.model.vision_tower import VisionTower
from mama.run.files import DIGESTS, check_digests, read_object, surviving
from mama.run.portable import MODEL, OLD_WEIGHTS
from mama.run.tensor_file import stored_tensors
from mama.settings.load import load
from mama.settings.schema import Tokens
from shards.from_json import from_json

FORMAT = 2
HEADS = "heads.safetensors"
LORA = ("merged", "adapter")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelFacts:
    """The content of model.json."""

    format: int
    name: str  # of the run
    step: int
    steps: int  # of the whole training
    checkpoint: str  # SHA-256 of the checkpoint's complete.json
    dtype: str  # fp32 or bf16
    lora: str  # merged or adapter
    release: str  # of mama, that wrote the folder


def is_bare(folder: Path) -> bool:
    """Whether a folder is a model folder by itself, and no run that holds one in model/."""
    return (folder / MODEL).is_file()


def model_folder(run: Path) -> Path:
    """The model folder of a run, or `run` itself if it is one."""
    folder = surviving(run)
    return folder if is_bare(folder) else surviving(run / "model")


def require_model(folder: Path) -> None:
    """Raise `ConfigError` if there is no model in `folder`, or one that an earlier release wrote."""
    if not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent}: no such run folder; train first")
    if not is_bare(folder):
        if is_old(folder):
            raise ConfigError(f"{folder}: an earlier release wrote this model, without {MODEL}; {AGAIN}")
        raise ConfigError(f"{folder}: no {MODEL}; run `mama consolidate` first")


def is_old(folder: Path) -> bool:
    """Whether an earlier release wrote this model folder."""
    return (folder / OLD_WEIGHTS).is_file() and (folder / "config.yaml").is_file() and not is_bare(folder)


def read_model(folder: Path) -> ModelFacts:
    """What model.json says. Raises `ConfigError` as `require_model` does, and if the file is damaged."""
    require_model(folder)
    try:
        facts = from_json(ModelFacts, read_object(folder / MODEL))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / MODEL}: was edited or damaged ({error}); {AGAIN}") from None
    if facts.dtype not in DTYPES or facts.lora not in LORA:
        raise ConfigError(f"{folder / MODEL}: was edited or damaged ({facts.dtype}, {facts.lora}); {AGAIN}")
    if facts.format != FORMAT:
        raise ConfigError(f"{folder / MODEL}: format {facts.format}, and this release reads {FORMAT}; {AGAIN}")
    return facts


def weights_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of the files that hold weights, or name the base of an adapter.

    Raises `ConfigError` if the folder has no digests.
    """
    digests = read_object(folder / DIGESTS)
    weights = {
        name: digest
        for name, digest in digests.items()
        if (name.endswith(".safetensors") and name != TRAINED_ON) or name == f"text/{BASE}"
    }
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def load_model(folder: Path, device: torch.device, base: str | None = None) -> tuple[MamaModel, Tokenizer]:
    """Load a consolidated model in its dtype, in evaluation mode on `device`, and its tokenizer.

    `base` is where the language model lies that an adapter was trained on, if not at the name in text/base.json.
    Raises `ConfigError` if there is no model, or if a file has changed since it was written.
    """
    folder = surviving(folder)
    require_model(folder)
    check_digests(folder, AGAIN)
    facts = read_model(folder)
    config = load(folder / "config.yaml")
    dtype, (kernel, text_kernel) = DTYPES[facts.dtype], attention.choose_both(config, device)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if facts.lora == "adapter":
        text = load_adapted(folder / "text", config, tokenizer, text_kernel, base)
        for parameter in text.parameters():
            parameter.data = parameter.data.to(dtype)
    else:
        backbone = _empty(folder / "text", text_kernel, dtype)
        text = TextTower(backbone, backbone.config.hidden_size, config.text.packing, config.text.sentences)
    backbone = _empty(folder / "vision", kernel, dtype)
    vision = VisionTower(backbone, config.vision.tokens, config.vision.local_block)
    model = MamaModel(vision, text, config.heads, config.loss)
    names = parts(model)
    fill(model, names.vision, weights_in(folder / "vision"), folder / "vision")
    if facts.lora == "merged":
        fill(model, names.text, weights_in(folder / "text"), folder / "text")
    fill(model, names.heads, stored_tensors(folder / HEADS), folder / HEADS)
    return model.to(device).eval(), tokenizer


def load_vision(folder: Path, kernel: str, tokens: Tokens) -> VisionTower:
    """The image tower in the folder of its part, in fp32; `tokens` as in `VisionConfig`."""
    tower = empty_vision(folder, kernel, tokens)
    fill(tower, vision_names(tower), weights_in(folder), folder, torch.float32)
    return tower


def empty_vision(folder: Path, kernel: str, tokens: Tokens) -> VisionTower:
    """An image tower of the shape that `folder` has in its config.json, in fp32; its weights are still to be read."""
    return VisionTower(_empty(folder, kernel, torch.float32), tokens)


def _empty(folder: Path, kernel: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of transformers whose weights are still to be read."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():
        return AutoModel.from_config(config, attn_implementation=kernel, trust_remote_code=False, dtype=dtype)
