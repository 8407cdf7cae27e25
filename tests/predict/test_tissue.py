"""A model that computes patches of tissue alone, from evaluation to heat maps and pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mama.evaluate.evaluation import evaluate
from mama.predict.images import find_images
from mama.predict.model import Model
from mama.predict.pictures import Pictured, pictures
from mama.predict.predict import Request, predict
from mama.report.page import write_report
from mama.settings.schema import Config
from tests.support.phantom_run import dicom_files, phantom_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = phantom_run(tmp_path_factory.mktemp("tissue"), tokens="tissue")
    evaluate(made, made.run_folder)
    return made


def test_an_evaluation_has_figures_and_a_report(config: Config) -> None:
    alignment = json.loads((config.run_folder / "eval" / "alignment" / "metrics.json").read_text())
    assert alignment["findings"]
    for row in alignment["rows"]:
        assert 0 <= row["hit_rate"]["value"] <= 1
        assert 0 <= row["box_auc"]["value"] <= 1
    with np.load(config.run_folder / "eval" / "alignment" / "maps.npz") as file:
        maps = file["maps"]
    assert len(maps)
    for values in maps:
        assert 0 < np.isnan(values).sum() < values.size
    assert write_report(config, config.run_folder).stat().st_size


def test_predictions_are_those_of_each_image_alone(config: Config) -> None:
    model = Model(config.run_folder, device="cpu")
    files = dicom_files(config)[:5]
    together = model.embed_images(files)
    for file, row in zip(files, together, strict=True):
        np.testing.assert_allclose(model.embed_images([file])[0], row, atol=1e-5)


def test_a_heat_map_has_values_where_there_is_tissue(config: Config, tmp_path: Path) -> None:
    model = Model(config.run_folder, device="cpu")
    file = dicom_files(config)[0]
    values = model.heat_map(file, "Findings: mass.")
    assert 0 < np.isfinite(values).sum() < values.size
    (seen,) = pictures(model.recipe(), find_images([file], None, config.data.cache_folder), 0)
    assert isinstance(seen, Pictured)
    canvas = torch.from_numpy(seen.canvas)[None, None]
    kept = model.model.vision(canvas.float() / 127.5 - 1).counts[0]
    assert kept < 32
    request = Request(config.run_folder, (str(file),), tmp_path / "out", ask=("Findings: mass.",), html=True)
    document = predict(request)
    (image,) = (image for exam in document["exams"] for image in exam["images"])
    (found,) = image["maps"].values()
    assert found["peak"]
    finite = values[np.isfinite(values)]
    span = found["high"] - found["low"]
    assert found["low"] - 1e-6 <= finite.min() <= found["low"] + 0.1 * span
    assert found["high"] + 1e-6 >= finite.max() >= found["high"] - 0.1 * span
    x, y = found["peak"]
    assert values[y, x] == pytest.approx(finite.max(), abs=0.02 * span)
