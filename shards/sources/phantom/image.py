"""The images of the synthetic cohort: they show exactly the lesions and the density that the facts of a breast state.

Drawn with the chest wall on the left, and mirrored at the end for a right breast. Each ingredient has its own random
stream, so that the same breast can be drawn without its lesions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.schema import Box, Finding
from shards.sources.phantom.anatomy import HEIGHT, SPACING, WIDTH, Geometry, Image, Rng, draw_outlines, place_lesion
from shards.sources.phantom.lesion import Lesion, add_lesion
from shards.sources.phantom.tissue import draw_tissue

WHITE = 4095  # 12 bits

GEOMETRY, TISSUE, PLACE, LESION, NOISE, LABEL = range(6)  # random streams


@dataclass(frozen=True)
class Breast:
    """The facts of one breast that its two views show."""

    laterality: str
    glandular_share: float  # of the breast without the muscle, 0..1
    depth: float  # mm from the chest wall to the nipple
    lesions: tuple[Lesion, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One view: 12-bit values, bright tissue on a dark background, and the findings with their boxes in pixels."""

    pixels: NDArray[np.uint16]  # [H, W]
    findings: tuple[Finding, ...]


def draw_breast(breast: Breast, key: tuple[int, ...]) -> dict[str, Picture]:
    """Draw both views of `breast`, CC and MLO; `key` (seed, patient, side) determines every random choice."""
    geometry = draw_outlines(breast.depth, _stream(key, 0, GEOMETRY))
    widest = max((lesion.size for lesion in breast.lesions), default=0.0)
    place = place_lesion(geometry["CC"], geometry["MLO"], widest / 2, _stream(key, 0, PLACE))
    return {
        view: _draw_view(breast, view, geometry[view], place[view], (*key, number))
        for number, view in enumerate(geometry)
    }


def _draw_view(
    breast: Breast, view: str, geometry: Geometry, place: tuple[float, float], key: tuple[int, ...]
) -> Picture:
    image = draw_tissue(geometry, breast.glandular_share, _stream(key, TISSUE))
    findings = []
    for lesion in breast.lesions:
        box = add_lesion(image, lesion, place, SPACING, _stream(key, LESION, lesion.finding.number))
        findings.append(replace(lesion.finding, box=box))
    image = _expose(image, geometry, _stream(key, NOISE))
    if breast.laterality == "R":
        image = np.ascontiguousarray(image[:, ::-1])
        findings = [replace(f, box=_mirror(f.box)) for f in findings if f.box]
    _burn_in_label(image, breast.laterality, view, _stream(key, LABEL))
    pixels = np.clip(np.rint(image * WHITE), 0, WHITE).astype(np.uint16)
    return Picture(pixels, tuple(findings))


def _mirror(box: Box) -> Box:
    return (WIDTH - box[2], box[1], WIDTH - box[0], box[3])


def _burn_in_label(image: Image, laterality: str, view: str, rng: Rng) -> None:
    """Add the technologist's marker to two images of five, at the upper edge away from the chest wall."""
    if rng.random() > 0.4:
        return
    text, scale = f"{laterality}{rng.choice(['-', ' '])}{view}", float(rng.uniform(0.55, 0.75))
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    margin = int(rng.integers(10, 24))
    left = WIDTH - margin - width if laterality == "L" else margin
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.putText(canvas, text, (left, margin + height), cv2.FONT_HERSHEY_SIMPLEX, scale, 240, 2, cv2.LINE_AA)
    np.maximum(image, canvas.astype(np.float32) / 255, out=image)


def _stream(key: tuple[int, ...], *purpose: int) -> Rng:
    return np.random.default_rng([*key, *purpose])


def _expose(image: Image, geometry: Geometry, rng: Rng) -> Image:
    """`image` [H, W] thinned towards the rim, with skin line, black background, focal blur and quantum noise."""
    rim = np.clip(geometry.from_skin / 13, 0, 1)
    thickness = np.sqrt(1 - (1 - rim) ** 2)  # the edge of a compressed breast is about half a circle
    skin = 0.07 * np.exp(-(((geometry.from_skin - 1.0) / 0.7) ** 2))
    image = np.where(geometry.from_skin > 0, image * (0.25 + 0.75 * thickness) + skin, 0.0).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.7)
    grain = cv2.GaussianBlur(rng.standard_normal(image.shape, np.float32), (0, 0), 0.5)
    return image + (0.004 + 0.028 * np.sqrt(image)) * grain
