"""A made-up archive in the published layout of the source `table`, row by row."""

from __future__ import annotations

BOX = {"x0": "X0", "y0": "Y0", "x1": "X1", "y1": "Y1", "kind": "Kind"}
