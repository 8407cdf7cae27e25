"""Mammography vision-language models: `mama.load` reads one that `mama consolidate` wrote.

model = mama.load("runs/quickstart/model")
document = model.predict(["exam/"], ask=["spiculated mass"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mama.predict.model import Model

__all__ = ["load"]


def load(folder: str | Path, device: str | None = None, base: str | None = None) -> Model:
    """Load the model of a run folder, or a model folder: see `mama.predict.model.Model`."""
    from mama.predict.model import Model  # torch and transformers: `import mama` stays light

    return Model(folder, device, base)
