"""Features on disk are read where they are of the same model, images and settings, and computed again where not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mama.evaluate import evaluation, kept_features
from mama.evaluate.evaluation import evaluate
from mama.settings.schema import Config
from tests.support.cohort import Oracle, write_shards
from tests.support.oracle_run import consolidated, install_oracle, oracle_config
from tests.support.saved_run import results_of


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = oracle_config(tmp_path)
    return replace(config, eval=replace(config.eval, tasks=["cancer"], bootstrap=0))


@pytest.fixture
def passes(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of images that a model has embedded."""
    found: list[int] = []
    embed = Oracle.embed_images

    def counted(model: Oracle, images: object) -> object:
        found.append(len(images))  # type: ignore[arg-type]
        return embed(model, images)  # type: ignore[arg-type]

    install_oracle(config, monkeypatch)
    monkeypatch.setattr(Oracle, "embed_images", counted)
    return found


def embedded(passes: list[int], config: Config) -> int:
    """How many images an evaluation embeds."""
    passes.clear()
    evaluate(config, config.run_folder)
    return sum(passes)


BOTH = 2 * (32 + 24)  # the training and the test images, by the trained and the untrained model


def test_a_second_evaluation_embeds_no_image_and_has_the_same_results(config: Config, passes: list[int]) -> None:
    assert embedded(passes, config) == BOTH
    first = results_of(config)
    assert embedded(passes, config) == 0
    assert results_of(config) == first
    assert embedded(passes, replace(config, eval=replace(config.eval, tasks=["density"]))) == 0


def other_shards(config: Config) -> Config:
    """Where the evaluated ones were."""
    shutil.rmtree(config.data.shards[0])
    write_shards(Path(config.data.shards[0]), {"train": 16, "test": 12}, known=("density", "cancer"))
    return config


def other_weights(config: Config) -> Config:
    consolidated(config, step=480)
    return config


CHANGES: dict[str, tuple[Callable[[Config], Config], int]] = {
    "weights": (other_weights, BOTH // 2),
    "shards": (other_shards, BOTH),
    "size": (lambda config: replace(config, data=replace(config.data, image_size=(128, 96))), BOTH),
    "fit": (lambda config: replace(config, data=replace(config.data, fit="stretch")), BOTH),
    "batch": (lambda config: replace(config, eval=replace(config.eval, batch=7)), BOTH),
    "split": (lambda config: replace(config, eval=replace(config.eval, split="train")), 0),
    "cache": (lambda config: replace(config, data=replace(config.data, cache="elsewhere")), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_of_something_else_are_not_used(config: Config, passes: list[int], change: str) -> None:
    evaluate(config, config.run_folder)
    changed, images = CHANGES[change]
    assert embedded(passes, changed(config)) == images


def test_other_code_computes_again(config: Config, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(config, config.run_folder)
    monkeypatch.setattr(kept_features, "code_digest", lambda: "of another release")
    assert embedded(passes, config) == BOTH


def test_damaged_features_are_computed_again(
    config: Config, passes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(config, config.run_folder)
    first = results_of(config)
    files = {path: path.read_bytes() for path in (config.run_folder / "features").iterdir()}
    assert sorted(path.name.split("-", 2)[::2] for path in files) == [
        ["test", "intensities.npz"],
        *(["test", f"trained-{what}.npz"] for what in ("images", "maps", "texts")),
        *(["test", f"untrained-{what}.npz"] for what in ("images", "maps", "texts")),
        *(["train", "intensities.npz"], ["train", "trained-images.npz"], ["train", "untrained-images.npz"]),
    ]
    for number, (path, content) in enumerate(files.items()):
        middle = len(content) // 2
        turned = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes((turned, content[:middle], b"")[number % 3])
    evaluate(config, config.run_folder)
    assert results_of(config) == first
    assert caplog.text.count("features are computed again") == len(files)
    assert {path: path.read_bytes() for path in files} == files


def test_an_untrained_model_of_other_weights_is_another_one(
    config: Config, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config, config.run_folder)
    build = evaluation.build

    def other(*arguments: object) -> Oracle:
        model: Oracle = build(*arguments)  # type: ignore[arg-type, assignment]
        model.weight.data += 1
        return model

    monkeypatch.setattr(evaluation, "build", other)
    assert embedded(passes, config) == BOTH // 2
