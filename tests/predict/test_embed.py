"""Embeddings in a file: one row an image, with its facts."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mama.errors import ConfigError
from mama.predict.embed import EmbedRequest, embed
from mama.predict.model import Model
from mama.settings.schema import Config
from shards.read.reader import ShardReader


def request(config: Config, out: Path, *inputs: object, **more: str) -> EmbedRequest:
    return EmbedRequest(config.run_folder, tuple(map(str, inputs)), out, **more)  # type: ignore[arg-type]


def test_a_row_an_image_with_the_labels_of_shards(config: Config, model: Model, tmp_path: Path) -> None:
    folder = config.data.shards[0]
    assert embed(request(config, tmp_path / "e.parquet", folder)) == []
    found = pd.read_parquet(tmp_path / "e.parquet")
    reader = ShardReader(folder)
    views = [(study, view) for study in map(reader.study, range(len(reader))) for view in study.views]
    assert list(found.exam) == [study.key for study, _ in views]
    assert list(found.patient) == [study.patient for study, _ in views]
    assert list(found.split) == [study.split for study, _ in views]
    for name in ("birads", "density", "cancer", "pathology"):
        assert list(found[name]) == [getattr(view.labels, name) for _, view in views]
    assert embed(request(config, tmp_path / "e.npz", folder, split="test")) == []
    with np.load(tmp_path / "e.npz") as arrays:  # without pickle
        rows = found[found.split == "test"]
        assert list(arrays["image"]) == list(rows.image)
        assert np.allclose(arrays["embeddings"], np.stack(rows.embedding), atol=1e-6)
        assert np.allclose(arrays["tower"], np.stack(rows.tower), atol=1e-5)
        assert arrays["cancer"].tolist() == [int(cancer) for cancer in rows.cancer]
        assert str(arrays["model"]) == model.facts["sha256"]


def test_of_files_labels_are_unknown_and_the_rest_goes_on(config: Config, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.dcm").write_bytes(b"")
    (refused,) = embed(request(config, tmp_path / "e.npz", archive, tmp_path / "cut.dcm"))
    assert refused["reason"] == "unreadable"
    with np.load(tmp_path / "e.npz") as arrays:
        assert set(arrays["birads"].tolist()) == {-1}
        assert set(arrays["density"].tolist()) == {""}
        assert arrays["embeddings"].shape == (16, config.heads.embed_dim)


def test_mistakes(config: Config, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--out: e.csv does not end in .npz or .parquet"):
        embed(request(config, tmp_path / "e.csv", archive))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'mama-clip\[parquet\]'"):
        embed(request(config, tmp_path / "e.parquet", archive))
    (tmp_path / "cut.dcm").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of the 1 images"):
        embed(request(config, tmp_path / "e.npz", tmp_path / "cut.dcm"))
    assert not (tmp_path / "e.npz").exists()
