"""Outlines of the synthetic breast: skin, pectoral muscle and nipple in CC and MLO, and where a lesion fits.

Drawn with the chest wall on the left. Lengths are millimetres in the compressed breast; images are [H, W] with x to the
right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH = 640, 512
SPACING = 0.375  # mm per pixel

Image = np.ndarray  # float32 [H, W]; OpenCV's stubs are no more specific
Rng = np.random.Generator


@dataclass(frozen=True)
class Geometry:
    """The outlines of one view, before any texture."""

    from_skin: Image  # [H, W] mm to the background, 0 outside the breast
    pectoral: Image  # [H, W] 0..1
    nipple: tuple[float, float]  # x, y in mm


def draw_outlines(depth: float, rng: Rng) -> dict[str, Geometry]:
    """The outlines of both views of a breast of `depth` mm from the chest wall to the nipple."""
    return {"CC": _cranio_caudal(depth, rng), "MLO": _medio_lateral_oblique(depth, rng)}


def _cranio_caudal(depth: float, rng: Rng) -> Geometry:
    """Half an oval on the chest wall, its lateral (upper) half slightly wider than the medial one."""
    y = np.arange(HEIGHT) * SPACING
    middle = y[-1] / 2 + rng.uniform(-8, 8)
    half = min(depth * rng.uniform(0.72, 0.85) + 16, 105.0)
    off = (y - middle) / np.where(y < middle, half * rng.uniform(1.0, 1.06), half * rng.uniform(0.92, 1.0))
    skin = depth * np.sqrt(np.clip(1 - np.abs(off) ** rng.uniform(2.1, 2.5), 0, None))
    return _geometry(skin, (depth, middle), np.zeros((HEIGHT, WIDTH), np.float32), rng)


def _medio_lateral_oblique(depth: float, rng: Rng) -> Geometry:
    """From the axilla at the upper edge to the inframammary fold, with the pectoral muscle."""
    y = np.arange(HEIGHT) * SPACING
    nipple = y[-1] * rng.uniform(0.56, 0.64)
    upper = depth * rng.uniform(0.50, 0.62) + 8
    lower = min(depth * rng.uniform(0.55, 0.65) + 18, y[-1] - nipple - 10)
    above = depth - (depth - upper) * np.clip((nipple - y) / nipple, 0, None) ** rng.uniform(1.7, 2.2)
    below = depth * np.sqrt(np.clip(1 - np.clip((y - nipple) / lower, 0, None) ** 2.3, 0, None))
    belly = rng.uniform(3, 9) + 0.25 * np.clip(y - nipple - lower + 12, 0, None)
    skin = np.where(y < nipple, above, np.maximum(below, belly))
    # The free edge of the muscle is slightly convex and ends at about the height of the nipple.
    x = np.arange(WIDTH) * SPACING
    width, height = upper * rng.uniform(0.68, 0.82), nipple * rng.uniform(0.85, 1.1)
    bow = rng.uniform(0.05, 0.18) * np.sin(np.pi * np.clip(y / height, 0, 1))
    edge = width * (1 - y / height + bow)  # mm at each row
    pectoral = np.clip((edge[:, None] - x[None, :]) / 3.0 + 0.5, 0, 1).astype(np.float32)
    return _geometry(skin, (depth, nipple), pectoral, rng)


def _geometry(skin: NDArray[np.float64], nipple: tuple[float, float], pectoral: Image, rng: Rng) -> Geometry:
    """The outlines with an uneven skin and the nipple. `skin` [H] is the extent of the breast in mm at each row."""
    y = np.arange(HEIGHT) * SPACING
    for period in (120.0, 70.0, 40.0):
        wave = rng.normal(0, period / 220) * np.sin(2 * np.pi * (y / period + rng.random()))
        skin = skin + np.where(skin > 15, wave, 0)
    skin = np.convolve(np.pad(skin, 24, "edge"), np.hanning(49) / 24, "valid")
    inside: Image = (np.arange(WIDTH)[None, :] * SPACING < skin[:, None]).astype(np.float32)
    tip = float(skin[round(nipple[1] / SPACING)])
    axes = (round(rng.uniform(3.5, 5.0) / SPACING), round(rng.uniform(4.0, 5.0) / SPACING))
    cv2.ellipse(inside, (round(tip / SPACING), round(nipple[1] / SPACING)), axes, 0, 0, 360, 1.0, -1)
    inside = cv2.GaussianBlur(inside, (0, 0), 3.0)
    from_skin = cv2.distanceTransform((inside > 0.5).astype(np.uint8), cv2.DIST_L2, 5) * np.float32(SPACING)
    return Geometry(from_skin, pectoral * (from_skin > 0), (tip, float(nipple[1])))


def place_lesion(cc: Geometry, mlo: Geometry, radius: float, rng: Rng) -> dict[str, tuple[float, float]]:
    """A point (x, y) in mm for each view, equally deep behind the nipple in both; `radius` of the lesion in mm."""
    reach = min(cc.nipple[0], mlo.nipple[0])
    for _ in range(500):
        behind = rng.uniform(0.25, 0.85) * reach
        points = {
            "CC": (cc.nipple[0] - behind, cc.nipple[1] + rng.normal(-5, 22)),
            "MLO": (mlo.nipple[0] - behind, mlo.nipple[1] + rng.normal(-15, 25)),
        }
        if _fits(cc, points["CC"], radius) and _fits(mlo, points["MLO"], radius):
            return points
    return {"CC": (cc.nipple[0] / 2, cc.nipple[1]), "MLO": (mlo.nipple[0] / 2, mlo.nipple[1])}


def _fits(geometry: Geometry, point: tuple[float, float], radius: float) -> bool:
    column, row = round(point[0] / SPACING), round(point[1] / SPACING)
    if not (0 <= column < WIDTH and 0 <= row < HEIGHT) or point[0] < radius + 2:
        return False
    return bool(geometry.from_skin[row, column] > radius + 5 and geometry.pectoral[row, column] < 0.1)
