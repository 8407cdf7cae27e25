"""Where the stages of a sweep run, and whether what they get there suits its points."""

from __future__ import annotations

from mama.errors import ConfigError
from mama.settings.load import load_profile
from mama.settings.paper import resolved
from mama.settings.schema import Config
from mama.settings.values import with_settings
from mama.sweep.sweep import Sweep
from slurm.profile import Profile


def profile_of(sweep: Sweep, step: str) -> Profile:
    """The profile of a step: that of its stage, else the default."""
    stage = "eval" if step.startswith("eval") else step
    return load_profile(sweep.profiles.get(stage) or sweep.profiles.get("default") or "local")


def cluster_of(sweep: Sweep) -> str:
    """Where the jobs of the sweep run: "local" or "slurm". Raises `ConfigError` if its profiles do not agree."""
    where = {step: profile_of(sweep, step).cluster for step in sweep.steps()}
    if len(set(where.values())) > 1:
        listed = ", ".join(f"{step}: {cluster}" for step, cluster in where.items())
        raise ConfigError(f"profiles: {listed}; all stages run on one cluster, or all on this machine")
    return next(iter(where.values()))


def require_ranks(sweep: Sweep) -> None:
    """Raise `ConfigError` if the ranks that a point will have cannot share its batches: fail now, not in the job."""
    for point in sweep.points:
        try:
            if "train" in sweep.stages:
                point.config.train.accumulation(_ranks(sweep, "train", point.config))
            for evaluation in sweep.evaluations:
                config = resolved(with_settings(point.config, evaluation.settings))
                if "finetune" in config.eval.protocols:
                    config.finetune.share(_ranks(sweep, evaluation.name, config))
        except ConfigError as error:
            raise ConfigError(f"{point.name}: {error}") from error


def _ranks(sweep: Sweep, step: str, config: Config) -> int:
    profile = profile_of(sweep, step)
    return config.train.ranks if profile.tasks == 1 or profile.cluster == "local" else profile.tasks
