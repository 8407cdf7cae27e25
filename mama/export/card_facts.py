"""What the files of a model folder say, for its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mama.export.adapters import BASE
from mama.export.figures import Metrics, Weights, read_calibration, read_metrics, weights_of
from mama.export.model_folder import ModelFacts, read_model
from mama.export.preprocessing import Preprocessing, read_preprocessing
from mama.export.training_texts import TrainingTexts, read_training_texts
from mama.model.text_tower import TEXT_MODELS
from mama.run.files import read_object
from mama.settings.load import load
from mama.settings.schema import Config


@dataclass(frozen=True)
class Adapter:
    """The base of an adapter: its name, tokens, the name of its list of blocks, and how many of them are left."""

    base: str
    vocabulary: int
    blocks: str
    layers: int | None


@dataclass(frozen=True)
class Facts:
    """What the files of a model folder say."""

    model: ModelFacts
    weights: Weights
    config: Config
    preprocessing: Preprocessing
    texts: TrainingTexts
    metrics: Metrics | None
    calibrated: bool  # there is a calibration of some of its scores
    image_model: str  # architecture of the image tower
    adapter: Adapter | None  # of the language model; None: merged

    @property
    def bases(self) -> list[str]:
        """The pretrained models that it began with."""
        return [name for name in (self.config.vision.model, self.config.text.model) if name]

    @property
    def sources(self) -> list[str]:
        """The archives that it was trained on."""
        return list(dict.fromkeys(one.source for one in self.preprocessing.sources))


def facts_of(folder: Path) -> Facts:
    """Read them. Raises `ConfigError` if a file is missing or damaged."""
    model = read_model(folder)
    return Facts(
        model=model,
        weights=weights_of(folder),
        config=load(folder / "config.yaml"),
        preprocessing=read_preprocessing(folder),
        texts=read_training_texts(folder),
        metrics=read_metrics(folder),
        calibrated=_is_calibrated(folder),
        image_model=_architecture(folder / "vision"),
        adapter=_adapter(folder / "text") if model.lora == "adapter" else None,
    )


def _is_calibrated(folder: Path) -> bool:
    found = read_calibration(folder)
    units = [unit for task in found.tasks.values() for unit in task.units.values()] if found else []
    return any(unit.temperature is not None for unit in units)


def _architecture(part: Path) -> str:
    return str(read_object(part / "config.json")["model_type"])


def _adapter(part: Path) -> Adapter:
    base, blocks = read_object(part / BASE), TEXT_MODELS[_architecture(part)].blocks
    return Adapter(str(base["name"]), base["vocabulary"], blocks, base["layers"])
