"""What a sweep consists of: points, each an ordinary run, and the stages that every point runs through."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mama.settings.schema import Config
from mama.settings.values import values_of

# Their order is that of the line. What `pack` and `check` do depends on the shards alone, so points share them.
STAGES = ("pack", "check", "train", "consolidate", "eval")
SHARED = ("pack", "check")
OWN = "sweep"  # folder of the sweep's own files, beside the folders of its points


@dataclass(frozen=True)
class Evaluation:
    """One of the evaluations of each point: its name, and the settings in which it differs from the point's own."""

    name: str  # "eval", or "eval-NAME" for one of several
    settings: dict[str, Any] = field(default_factory=dict)  # dotted setting -> value


@dataclass(frozen=True)
class Point:
    """One run of a sweep. Its folder is `config.run_folder`."""

    config: Config  # resolved; `config.name` is the point's name, `config.runs` the sweep's folder
    differs: dict[str, Any]  # axis (dotted setting, or "recipe") -> value, in the order of the axes

    @property
    def name(self) -> str:
        """The name of the point, and of its folder."""
        return self.config.name


@dataclass(frozen=True)
class Sweep:
    """A sweep, resolved from its YAML file."""

    name: str
    folder: Path  # holds a folder for each point, and `sweep/` for its own files
    points: list[Point]
    stages: list[str]  # of STAGES, in their order
    evaluations: list[Evaluation]  # empty without the stage eval
    profiles: dict[str, str] = field(default_factory=dict)  # stage, or "default" -> profile
    at_once: int | None = None  # points that run at the same time, in each stage; None: as many as the cluster allows
    baseline: dict[str, Any] = field(default_factory=dict)  # of the points' `differs`: which the report compares with

    @property
    def own(self) -> Path:
        """The folder of the sweep's own files."""
        return self.folder / OWN

    def values(self, point: Point) -> dict[str, Any]:
        """The point's value of every axis; its own setting where the axis is not named for this point."""
        axes = dict.fromkeys(axis for other in self.points for axis in other.differs)
        own = values_of(point.config)
        return {axis: point.differs.get(axis, own.get(axis)) for axis in axes if axis in point.differs or axis in own}

    def steps(self) -> list[str]:
        """The stages of a point, with each evaluation as a stage of its own."""
        line = [stage for stage in self.stages if stage != "eval"]
        return line + [evaluation.name for evaluation in self.evaluations]
