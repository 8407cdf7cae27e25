"""Draw masses and calcifications into a synthetic mammogram, by their BI-RADS descriptors."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from shards.schema import Box, Finding
from shards.sources.phantom.anatomy import Image, Rng

BRIGHTEST = 0.97  # of the stored range
SUBPIXEL = 4  # bits after the point in OpenCV's coordinates
BOX_EDGE = 0.15  # share of the full contrast at which a lesion ends


@dataclass(frozen=True)
class Lesion:
    """A finding without its box yet, and its diameter in mm (of a mass without its spicules)."""

    finding: Finding
    size: float


def add_lesion(image: Image, lesion: Lesion, centre: tuple[float, float], spacing: float, rng: Rng) -> Box:
    """Brighten `image` [H, W] (0..1, chest wall left) around `centre` (x, y in mm); return the box in pixels.

    `spacing` is in mm per pixel. Malignant masses and all calcifications approach a fixed brightness, so that they show
    in dense tissue; a benign mass adds a little to the tissue around it.
    """
    finding, diameter = lesion.finding, lesion.size / spacing
    cover = _mass(finding, diameter, rng) if finding.kind == "mass" else _calcifications(finding, diameter, rng)
    side = cover.shape[0]
    left, top = (round(c / spacing) - side // 2 for c in centre)
    rows = slice(max(top, 0), min(top + side, image.shape[0]))
    columns = slice(max(left, 0), min(left + side, image.shape[1]))
    cover = cover[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    under = image[rows, columns]
    if finding.kind == "calcification":
        under += cover * (BRIGHTEST - under)
    elif finding.pathology == "malignant":
        under += cover * np.clip(0.92 + 0.2 * (under - 0.4) - under, 0.1, None)
    else:
        under += cover * np.clip((0.55 if finding.density == "low" else 0.66) - under, 0.07, 0.24)
    y, x = np.nonzero(cover > BOX_EDGE)
    return (
        float(columns.start + x.min()),
        float(rows.start + y.min()),
        float(columns.start + x.max() + 1),
        float(rows.start + y.max() + 1),
    )


def _mass(finding: Finding, diameter: float, rng: Rng) -> Image:
    """Cover 0..1 on a square patch [h, h] with the mass in its centre; `diameter` in pixels."""
    half = round(diameter * 1.3) + 4
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    tilt, long = rng.uniform(0, np.pi), {"round": 1.0, "oval": rng.uniform(1.25, 1.6)}.get(finding.shape or "", 1.15)
    along, across = x * np.cos(tilt) + y * np.sin(tilt), y * np.cos(tilt) - x * np.sin(tilt)
    radius, angle = cv2.cartToPolar(along.astype(np.float32), (across * long).astype(np.float32))
    edge = np.full_like(angle, diameter / 2)
    if finding.shape == "irregular":
        for lobes in range(1, 9):
            edge *= 1 + rng.normal(0, 0.28 / lobes) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    softness = {"circumscribed": 0.06, "spiculated": 0.11}.get(finding.margin or "", 0.17)
    core = 1 / (1 + np.exp(np.clip((radius / edge - 1) / softness, -30, 30)))
    cover = core * (1 - 0.25 * np.clip(radius / edge, 0, 1) ** 2)  # a lens is thickest in its middle
    if finding.margin == "spiculated":
        cover = np.maximum(cover, _spicules(half, diameter / 2, rng))
    return cv2.GaussianBlur(cover.astype(np.float32), (0, 0), 0.8)


def _spicules(half: int, radius: float, rng: Rng) -> Image:
    """Straight strands 0..0.75 that leave the core in all directions and fade out; sizes in pixels."""
    canvas = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    number = int(rng.integers(10, 20))
    for ray in range(number):
        angle = 2 * np.pi * (ray + rng.uniform(-0.6, 0.6)) / number
        turn, length = rng.normal(0, 0.2), radius * min(1.2 + rng.gamma(2.0, 0.25), 2.5)
        reach = np.linspace(0.6 * radius, length, 7)
        way = angle + turn * reach / length
        points = half + np.stack([np.cos(way), np.sin(way)], 1) * reach[:, None]
        points = np.rint(points * 2**SUBPIXEL).astype(np.int32)
        bright = rng.uniform(90, 200)
        for step in range(6):
            (start, end), width = points[step : step + 2].tolist(), 3 if step < 2 else 2
            cv2.line(canvas, start, end, int(bright * (1 - step / 7)), width, cv2.LINE_AA, SUBPIXEL)
    return cv2.GaussianBlur(canvas, (0, 0), 0.7).astype(np.float32) / 255


def _calcifications(finding: Finding, diameter: float, rng: Rng) -> Image:
    """Cover 0..1 on a square patch [h, h]: fine angular specks if malignant, else a few large smooth ones."""
    half = round(diameter / 2) + 8
    canvas = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    malignant = finding.pathology == "malignant"
    tilt = rng.uniform(0, np.pi)
    narrow = 0.25 if finding.distribution == "linear" else 0.8
    for _ in range(int(rng.integers(14, 26) if malignant else rng.integers(3, 6))):
        distance, angle = diameter / 2 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        along, across = distance * np.cos(angle), distance * np.sin(angle) * narrow
        centre = [along * np.cos(tilt) - across * np.sin(tilt), along * np.sin(tilt) + across * np.cos(tilt)]
        corners = int(rng.integers(3, 6)) if malignant else 16
        turn = 2 * np.pi * (np.arange(corners) + rng.random()) / corners
        reach = rng.uniform(0.8, 2.2, corners) if malignant else np.full(corners, rng.uniform(2.0, 4.0))
        outline = half + np.array(centre) + np.stack([np.cos(turn), np.sin(turn)], 1) * reach[:, None]
        points = np.rint(outline * 2**SUBPIXEL).astype(np.int32)
        cv2.fillPoly(canvas, [points], int(rng.integers(190, 256)), cv2.LINE_AA, SUBPIXEL)
    return cv2.GaussianBlur(canvas, (0, 0), 0.5).astype(np.float32) / 255
