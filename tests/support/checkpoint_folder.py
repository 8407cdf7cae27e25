"""A checkpoint written without training, and the weights that one holds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mama.run.checkpoint_marker import FROZEN, Marker, run_digest, write_marker
from mama.run.checkpoints import read_tensors
from mama.run.files import sha256


def saved(
    run: Path,
    step: int,
    score: float | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    frozen: dict[str, str] | None = None,
) -> Path:
    """A checkpoint of these tensors, or of a single one, as `save` leaves it."""
    place = run / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    save_file(tensors or {"weight/w": torch.tensor([float(step)])}, place / "state-00000.safetensors")
    (place / FROZEN).write_text(json.dumps(frozen or {}))
    files = list(place.iterdir())
    sizes, digests = {p.name: p.stat().st_size for p in files}, {p.name: sha256(p) for p in files}
    facts = {"skipped_steps": 0}
    write_marker(place, Marker(step, 1, score, {"heads/None/plain": 2.0}, facts, sizes, digests, run_digest(run)))
    return place


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained tensors and buffers by name, in fp32."""
    return {name: tensor for _, name, tensor in read_tensors(checkpoint, ("weight", "buffer"))}
