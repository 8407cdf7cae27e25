"""Evaluation on one set of images after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mama.evaluate import results
from mama.evaluate.evaluation import Show, evaluate
from mama.evaluate.results import Results
from mama.run.portable import folder_name
from mama.settings.schema import Config


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
