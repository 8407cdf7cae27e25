from __future__ import annotations

import re

import numpy as np

from mama.data.images import inferno
from mama.report import pictures
from mama.report.page import TEMPLATE


def test_the_ramp_of_the_report_has_the_colours_of_its_maps() -> None:
    (ramp,) = re.findall(r"linear-gradient\(90deg, ([^)]*)\)", TEMPLATE.read_text())
    drawn = [[int(colour[i : i + 2], 16) for i in (5, 3, 1)] for colour in ramp.split(", ")]  # BGR
    mapped = inferno(np.array([[0, 64, 128, 191, 255]], np.uint8))[0]
    assert np.abs(mapped.astype(int) - drawn).max() <= 3


def test_a_blend_is_brightest_where_the_map_is_and_leaves_its_minimum_alone() -> None:
    pixels = np.full((80, 60), 100, np.uint8)
    values = np.zeros((8, 6), np.float32)
    values[2, 4] = 1.0
    heated = pictures.blend(pixels, values)
    y, x = np.unravel_index(heated.sum(2).argmax(), (80, 60))
    assert (y // 10, x // 10) == (2, 4)
    assert heated[75, 5].tolist() == [100, 100, 100]
    assert np.array_equal(pictures.blend(pixels, np.zeros((8, 6), np.float32))[..., 0], pixels)
    framed = pictures.draw_boxes(pixels, [(10.0, 20.0, 30.0, 40.0)])
    assert framed[20, 20].tolist() == list(pictures.BOX_COLOUR)
    assert framed[30, 20].tolist() == [100, 100, 100]


def test_a_blend_has_no_colour_where_there_is_no_value() -> None:
    """Not even at the edge of the highest patch, which smoothing would carry across."""
    pixels = np.full((80, 60), 100, np.uint8)
    values = np.full((8, 6), 0.2, np.float32)
    values[2, 3] = 1.0
    values[:, 4:] = np.nan
    heated = pictures.blend(pixels, values)
    assert (heated[:, 40:] == 100).all()
    assert (heated[25, 39] != 100).any()
    y, x = np.unravel_index(heated.sum(2).argmax(), (80, 60))
    assert (y // 10, x // 10) == (2, 3)
