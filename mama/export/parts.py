"""The parts of a model folder, and the names of their tensors: for the towers those of transformers, else ours.

A tower's files have the names that `save_pretrained` would give: they load with every release of transformers that
knows the architecture, whatever it calls its modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mama.model.mama_model import MamaModel
from mama.model.text_tower import TextTower
from mama.model.vision_tower import VISION_MODELS, VisionTower

TOWERS = ("vision", "text")
# What peft puts around the names of a tensor of its base, and into those of its own.
PEFT = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.token_adapter(?=\.)")
ADDED = re.compile(r"\.lora_[AB]\.|\.trainable_tokens_")


@dataclass(frozen=True)
class Parts:
    """{name in the part's files: name in the model} of each part."""

    vision: dict[str, str]
    text: dict[str, str]
    heads: dict[str, str]


def parts(model: MamaModel) -> Parts:
    """The parts of a model; of a language model with adapters those of its base."""
    names = list(model.state_dict())
    heads = {name: name for name in names if name.partition(".")[0] not in TOWERS}
    vision = {stored: f"vision.{name}" for stored, name in vision_names(model.vision).items()}
    return Parts(vision, {stored: f"text.{name}" for stored, name in text_names(model.text).items()}, heads)


def vision_names(tower: VisionTower) -> dict[str, str]:
    """{name in the files: name in the tower}; the last norm, which the tower applies itself, is in its place again."""
    backbone = tower.backbone
    norm = VISION_MODELS[backbone.config.model_type]
    own = {name: f"backbone.{name}" for name in backbone.state_dict()}
    own |= {f"{norm}.{name}": f"norm.{name}" for name in tower.norm.state_dict()}
    stored = stored_names(backbone, own)
    return {stored[name]: origin for name, origin in own.items()}


def text_names(tower: TextTower) -> dict[str, str]:
    """{name in the files: name in the tower} of the language model, without what peft added to it."""
    names = [name for name in tower.backbone.state_dict() if not ADDED.search(f".{name}")]
    own = {PEFT.sub("", name): f"backbone.{name}" for name in names}
    stored = stored_names(base_of(tower), own)
    return {stored[name]: origin for name, origin in own.items()}


def base_of(tower: TextTower) -> PreTrainedModel:
    """The language model, without peft's wrapper around it."""
    backbone = tower.backbone
    return cast(PreTrainedModel, backbone.get_base_model()) if isinstance(backbone, PeftModel) else backbone


def stored_names(backbone: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names of a backbone's tensors in its files by those in the model."""
    marks = {name: torch.empty(0) for name in names}
    written = {id(mark): stored for stored, mark in revert_weight_conversion(backbone, dict(marks)).items()}
    # Where transformers would join or split tensors, the names of the model are the ones that load.
    return {name: written.get(id(mark), name) for name, mark in marks.items()}
