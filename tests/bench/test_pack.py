"""The benchmark of packing: its stages are those of packing, and are the same functions again afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from shards import bench


def test_the_stages_are_timed_and_put_back(tmp_path: Path) -> None:
    pixels = np.zeros((300, 200), dtype=np.uint8)
    pixels[50:250, :120] = np.random.default_rng(0).integers(60, 200, (200, 120))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    before = [getattr(module, name) for module, name in bench.STAGES]
    seconds, inside = bench._time_ours([tmp_path / "a.png"])
    assert 0 < inside < seconds
    with bench._timed_stages() as calls:
        bench.ours(tmp_path / "a.png")
    assert len(calls) >= 3, "opened, shrunk and encoded at least"
    assert [getattr(module, name) for module, name in bench.STAGES] == before
