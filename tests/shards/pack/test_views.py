"""What training views show, over real mammograms, phantoms and odd pictures, with the settings of every recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mama.data import augment
from mama.data.images import BACKGROUND, to_canvas
from mama.settings.load import load, shipped_configs
from mama.settings.schema import AugmentConfig
from shards.image.picture import PictureConfig, read_picture
from shards.sources.phantom.studies import write_archive
from tests.support.archives import mammograms

Array = NDArray[Any]

RECIPES = [path for path in shipped_configs().rglob("*.yaml") if path.parent.name not in ("slurm", "sweeps", "tasks")]
VIEWS = 40  # of each picture


def half_ellipse(height: int, width: int, depth: float = 1.0) -> Array:
    """A breast of even grey at the left edge, `depth` of the width deep."""
    y, x = np.mgrid[:height, :width]
    inside = np.hypot((y + 0.5 - height / 2) / (height / 2), (x + 0.5) / (depth * width)) < 1
    return np.where(inside, 150, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Array]]:
    root = tmp_path_factory.mktemp("views") / "phantom"
    write_archive(root, 2, 0, workers=1)
    phantoms = sorted(root.rglob("*.dcm"))
    assert len(phantoms) == 8
    corner = np.zeros((700, 700), np.uint8)  # no breast was found, and the whole image was packed
    corner[:300, :150] = half_ellipse(300, 150)
    return {
        "real": [read_picture(path, PictureConfig()).pixels for path in mammograms()],
        "phantom": [read_picture(path, PictureConfig(long_side=256)).pixels for path in phantoms],
        "odd": [half_ellipse(1000, 200), half_ellipse(300, 500), half_ellipse(500, 400, 0.5), corner],
    }


def settings() -> dict[str, tuple[AugmentConfig, tuple[int, int], Any]]:
    """What decides a recipe's views, once for all recipes that share it; long sides are cut to 130 to be quick."""
    found = {}
    for path in sorted(RECIPES, key=lambda path: path.stem):
        data = load(path).data
        scale = min(1.0, 130 / max(data.image_size))
        size = round(data.image_size[0] * scale), round(data.image_size[1] * scale)
        found[path.stem] = (replace(data.augment, jitter=0.0, blur=0.0), size, data.fit)
    return {name: kept for name, kept in found.items() if kept not in list(found.values())[: list(found).index(name)]}


SETTINGS = settings()


def tissue_shares(image: Array, config: AugmentConfig, size: tuple[int, int], how: Any) -> Array:
    """Of `VIEWS` views of one picture, as the model gets them, the shares of pixels that are no air."""
    canvas = to_canvas(image, size, how)
    rng = np.random.default_rng(image.shape[1])
    rows = torch.from_numpy(np.stack([augment.draw(config, canvas, rng) for _ in range(VIEWS)]))
    views = augment.apply(torch.from_numpy(canvas).expand(VIEWS, 1, -1, -1), rows)
    return ((views + 1) * 127.5 > BACKGROUND).double().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_no_recipe_trains_on_black_views(name: str, pictures: dict[str, list[Array]]) -> None:
    for kind, images in pictures.items():
        shares = np.concatenate([tissue_shares(image, *SETTINGS[name]) for image in images])
        assert (shares < 0.01).mean() == 0, (kind, shares.min())
        assert (shares < 0.1).mean() <= (0.1 if kind == "odd" else 0.01), (kind, np.sort(shares)[:20])


def test_every_recipe_is_among_them() -> None:
    assert {"cdd_cesm", "clip", "mama_published_code", "quickstart"} == set(SETTINGS)
    assert len(RECIPES) > 15
    assert SETTINGS["clip"][0] == replace(AugmentConfig(), jitter=0.0, blur=0.0)
