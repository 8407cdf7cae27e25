"""Evaluation on one set of images after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mama.errors import ConfigError
from mama.evaluate import provenance, results
from mama.evaluate.evaluation import Show, evaluate
from mama.evaluate.results import Results
from mama.run.portable import folder_name
from mama.settings.schema import Config
from shards.errors import ShardError


def evaluate_sets(config: Config, run: Path, show: Show | None = None) -> dict[str, Results]:
    """Evaluate on each folder of `config.eval.on` by itself, or if there is none on `config.data.shards`.

    Returns the results by the name of the folder, otherwise as `evaluate` does. Of several folders `show` gets one
    table at the end.
    """
    found = {}
    for name, one in sets_of(config).items():
        found[name] = evaluate(one, run, _headed(show, name))
    if show and len(found) > 1 and all(found.values()):
        named = {f"{name}: {task}": document for name, of_set in found.items() for task, document in of_set.items()}
        show(results.results_table({name: document for name, document in named.items() if "classes" in document}))
    return found


def _headed(show: Show | None, name: str) -> Show | None:
    """`show` with the name of the folder above each text."""
    return show if show is None or not name else lambda text: show(f"on {name}:\n{text}")


def require_sets(config: Config) -> None:
    """Raises `ConfigError` if one of `config.eval.on` is no folder of shards, or has no image of the evaluated split.

    Before any of them is measured, which may take hours.
    """
    for one in sets_of(config).values() if config.eval.on else ():
        (address,), split = one.data.shards, config.eval.split
        try:
            (folder,) = provenance.shard_set(one)["folders"]
        except ShardError as error:
            raise ConfigError(f"eval.on: {error}") from None
        if split not in (there := [row["split"] for row in folder["splits"]]):
            raise ConfigError(f"eval.on: {address} has no image of eval.split={split}; it has {', '.join(there)}")


def sets_of(config: Config) -> dict[str, Config]:
    """Settings of one evaluation by the name of its folder of shards; of two of one name by their paths.

    `eval.on` stays, as the files of `eval.boxes` may name images of all of them.
    """
    if not config.eval.on:
        return {"": config}
    names = [folder_name(address) for address in config.eval.on]
    found = {}
    for name, address in zip(names, config.eval.on, strict=True):
        data = replace(config.data, shards=[address], shard_weights=[])
        found[name if names.count(name) == 1 else address] = replace(config, data=data)
    return found
