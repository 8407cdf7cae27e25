"""One run on synthetic patients for all tests of predictions, evaluated; nothing may change its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from mama.evaluate.evaluation import evaluate
from mama.predict.model import Model
from mama.settings.schema import Config
from tests.support.phantom_run import phantom_run


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = phantom_run(tmp_path_factory.mktemp("phantom-run"))
    evaluate(made, made.run_folder)
    return made


@pytest.fixture(scope="session")
def model(config: Config) -> Model:
    return Model(config.run_folder, device="cpu")


@pytest.fixture(scope="session")
def archive(config: Config) -> Path:
    return Path(config.runs).parent / "dicom"
