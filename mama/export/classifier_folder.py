"""A fine-tuned classifier on disk: weights, shape of the image tower and names of the classes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from mama.errors import ConfigError
from mama.export.model_folder import empty_vision, load_vision
from mama.model import attention
from mama.model.classifier import Classifier
from mama.run.files import check_digests, read_object, surviving, write_digests, write_json
from mama.run.tensor_file import Shape, write_tensors
from mama.settings.load import load
from mama.settings.schema import Tokens

CLASSES, SHAPE, WEIGHTS = "classes.json", "vision/config.json", "model.safetensors"


@dataclass(frozen=True)
class Named:
    """A classifier and the names of its classes, in the order of its outputs."""

    model: Classifier
    classes: list[str]


def new_classifier(folder: Path, classes: int, kernel: str) -> Classifier:
    """The image tower of the consolidated model in `folder`, with a new head, in training mode."""
    folder = surviving(folder)
    return Classifier(load_vision(folder / "vision", kernel, tokens_of(folder)), classes).train()


def save_classifier(named: Named, model: Path, folder: Path) -> None:
    """Write to the new folder `folder`, digests last; the shape is that of the consolidated model in `model`."""
    folder.mkdir(parents=True)
    tensors = named.model.state_dict()
    shapes = {name: Shape.of(tensor) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, shapes, lambda name: tensors[name].cpu())
    (folder / SHAPE).parent.mkdir()
    shutil.copyfile(surviving(model) / SHAPE, folder / SHAPE)
    write_json(folder / CLASSES, {"classes": named.classes, "tokens": tokens_of(model)})
    write_digests(folder)


def load_classifier(folder: Path, device: torch.device, kernel: str = "auto") -> Named:
    """Load in evaluation mode. Raises `ConfigError` if there is none, or a file has changed since it was written."""
    if not (folder / WEIGHTS).exists():
        raise ConfigError(f"{folder}: no {WEIGHTS}; evaluate with finetune in eval.protocols")
    check_digests(folder, f"remove {folder.parent} to fine-tune again")
    made = read_object(folder / CLASSES)
    classes = [str(name) for name in made["classes"]]
    # Earlier releases computed all patches and say nothing.
    tokens: Tokens = "tissue" if made.get("tokens") == "tissue" else "all"
    kernel = attention.choose(kernel, device, packed=tokens == "tissue")
    model = Classifier(empty_vision((folder / SHAPE).parent, kernel, tokens), len(classes))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return Named(model.to(device).eval(), classes)


def tokens_of(model: Path) -> Tokens:
    """`vision.tokens` of the consolidated model in a folder."""
    return load(surviving(model) / "config.yaml").vision.tokens
