from __future__ import annotations

import re

import numpy as np

from mama.data.colour_map import inferno
from mama.report.page import TEMPLATE


def test_the_ramp_of_the_report_has_the_colours_of_its_maps() -> None:
    (ramp,) = re.findall(r"linear-gradient\(90deg, ([^)]*)\)", TEMPLATE.read_text())
    drawn = [[int(colour[i : i + 2], 16) for i in (5, 3, 1)] for colour in ramp.split(", ")]  # BGR
    mapped = inferno(np.array([[0, 64, 128, 191, 255]], np.uint8))[0]
    assert np.abs(mapped.astype(int) - drawn).max() <= 3
