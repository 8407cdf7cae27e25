"""Draws the mammograms of the synthetic cohort: what `phantom` says of a breast is what is seen.

Everything is drawn with the chest wall at the left and mirrored at the end for a right breast. Lengths
are millimetres in the compressed breast; images are [H, W] with x to the right and y downwards.
Each ingredient has its own random stream, so that the same breast can be drawn without its lesions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.schema import Box, Finding
from shards.sources.phantom.lesion import Lesion, add_lesion

HEIGHT, WIDTH = 640, 512
SPACING = 0.375  # mm per pixel
WHITE = 4095  # 12 bits

# Share of the breast that fibroglandular tissue covers, per BI-RADS density. The ACR names no figures
# since its 5th edition; these are about the middles of the quartiles of the 4th.
GLANDULAR_SHARE = {"A": (0.02, 0.08), "B": (0.18, 0.30), "C": (0.42, 0.56), "D": (0.72, 0.86)}

GEOMETRY, TISSUE, PLACE, LESION, NOISE, LABEL = range(6)  # random streams

Image = np.ndarray  # float32 [H, W]; OpenCV's stubs know no more than this
Rng = np.random.Generator


@dataclass(frozen=True)
class Breast:
    """What is needed to draw both views of one breast."""

    laterality: str
    glandular_share: float  # of the breast without the muscle, 0..1
    depth: float  # mm from the chest wall to the nipple
    lesions: tuple[Lesion, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One view: 12-bit values, bright tissue on dark air, and the findings with their boxes."""

    pixels: NDArray[np.uint16]  # [H, W]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Geometry:
    """Where things are in one view, before any texture."""

    from_skin: Image  # [H, W] mm to the nearest air, 0 outside the breast
    pectoral: Image  # [H, W] 0..1
    nipple: tuple[float, float]  # x, y in mm


def draw_breast(breast: Breast, key: tuple[int, ...]) -> dict[str, Picture]:
    """Both views of `breast`, CC and MLO; `key` (seed, patient, side) decides every random choice."""
    rng = _stream(key, 0, GEOMETRY)
    geometry = {"CC": _cranio_caudal(breast.depth, rng), "MLO": _medio_lateral_oblique(breast.depth, rng)}
    widest = max((lesion.size for lesion in breast.lesions), default=0.0)
    place = _place(geometry["CC"], geometry["MLO"], widest / 2, _stream(key, 0, PLACE))
    return {
        view: _draw_view(breast, view, geometry[view], place[view], (*key, number))
        for number, view in enumerate(geometry)
    }


def _draw_view(
    breast: Breast, view: str, geometry: Geometry, place: tuple[float, float], key: tuple[int, ...]
) -> Picture:
    image = _tissue(geometry, breast.glandular_share, _stream(key, TISSUE))
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
    """On two images of five: the technologist's marker, at the upper edge away from the chest wall."""
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


# ---- geometry


def _cranio_caudal(depth: float, rng: Rng) -> Geometry:
    """Half an oval on the chest wall, its lateral (upper) half a little wider than the medial one."""
    y = np.arange(HEIGHT) * SPACING
    middle = y[-1] / 2 + rng.uniform(-8, 8)
    half = min(depth * rng.uniform(0.72, 0.85) + 16, 105.0)
    off = (y - middle) / np.where(y < middle, half * rng.uniform(1.0, 1.06), half * rng.uniform(0.92, 1.0))
    skin = depth * np.sqrt(np.clip(1 - np.abs(off) ** rng.uniform(2.1, 2.5), 0, None))
    return _geometry(skin, (depth, middle), np.zeros((HEIGHT, WIDTH), np.float32), rng)


def _medio_lateral_oblique(depth: float, rng: Rng) -> Geometry:
    """From the axilla at the upper edge to the inframammary fold, with the pectoral muscle behind."""
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
    """`skin` is the breast's extent in mm at each row."""
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


def _place(cc: Geometry, mlo: Geometry, radius: float, rng: Rng) -> dict[str, tuple[float, float]]:
    """A point (x, y) in mm for each view that lies equally deep behind the nipple in both."""
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


# ---- tissue


def _fractal(rng: Rng) -> Image:
    """Noise of unit variance with a power spectrum of about 1/f^3 (0.71 per octave in two dimensions),
    as found in mammograms: Burgess, Jacobson and Judy, Medical Physics 28 (2001) 419.
    """
    noise: Image = rng.standard_normal((HEIGHT >> 7, WIDTH >> 7), np.float32)
    for octave in range(1, 8):
        height, width = HEIGHT >> (7 - octave), WIDTH >> (7 - octave)
        noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        noise = noise + np.float32(0.71**octave) * rng.standard_normal((height, width), np.float32)
    return (noise - noise.mean()) / noise.std()


def _strands(nipple: tuple[float, float], rng: Rng) -> Image:
    """Ducts and ligaments: noise of unit variance, drawn out along the rays that leave the nipple."""
    rays = cv2.GaussianBlur(rng.standard_normal((512, 64), np.float32), (0, 0), sigmaX=0.8, sigmaY=1.6)
    x, y = np.meshgrid(np.arange(WIDTH, dtype=np.float32), np.arange(HEIGHT, dtype=np.float32))
    # The rays meet a little outside the skin, or they would shrink to nothing at the nipple.
    radius, angle = cv2.cartToPolar(x - np.float32(nipple[0] / SPACING + 45), y - np.float32(nipple[1] / SPACING))
    bend = 12 * np.sin(radius / 50 + 2 * np.pi * np.float32(rng.random()))
    turn = angle * np.float32(512 / (2 * np.pi)) + bend
    noise = cv2.remap(rays, radius / 11, turn, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
    return noise / noise.std()


def _vessels(geometry: Geometry, rng: Rng) -> Image:
    """A few thin winding lines from the chest wall towards the nipple, 0..1."""
    canvas = np.zeros((HEIGHT, WIDTH), np.uint8)
    for _ in range(rng.integers(3, 7)):
        t = np.linspace(0, 1, 30)
        start, end = rng.uniform(-55, 55), rng.uniform(-18, 18)
        wave = rng.uniform(2, 6) * np.sin(2 * np.pi * (t * rng.uniform(0.8, 2.0) + rng.random()))
        x = t * geometry.nipple[0] * rng.uniform(0.6, 0.85)
        y = geometry.nipple[1] + start * (1 - t) + end * t + wave
        line = np.rint(np.stack([x, y], 1) / SPACING * 16).astype(np.int32)
        cv2.polylines(canvas, [line], False, int(rng.integers(120, 230)), int(rng.integers(1, 4)), cv2.LINE_AA, shift=4)
    return cv2.GaussianBlur(canvas, (0, 0), 0.9).astype(np.float32) / 255


def _tissue(geometry: Geometry, share: float, rng: Rng) -> Image:
    """Fat (about 0.3 of the brightest), glandular tissue and muscle (about 0.55), ligaments and vessels."""
    coarse, fine = _fractal(rng), _fractal(rng)
    strands = _strands(geometry.nipple, rng)
    gland = _gland(geometry, share, coarse + 0.28 * fine + 0.25 * strands)
    ligaments = np.clip(1 - np.abs(fine + 0.3 * strands) * 3.5, 0, None) ** 2  # thin curved sheets
    image = 0.27 + 0.02 * coarse + 0.015 * fine + 0.01 * strands + 0.085 * ligaments + 0.09 * _vessels(geometry, rng)
    image += gland * (0.23 + 0.03 * fine + 0.02 * strands + 0.03 * coarse)
    muscle = 0.46 + 0.03 * coarse + 0.02 * fine
    image += geometry.pectoral * (muscle - 0.75 * image)
    return image.astype(np.float32)


def _gland(geometry: Geometry, share: float, texture: Image) -> Image:
    """Soft cover 0..1 of fibroglandular tissue: a cone behind the nipple, broken up by `texture`."""
    x = np.arange(WIDTH, dtype=np.float32)[None, :] * SPACING
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] * SPACING
    depth = geometry.nipple[0]
    behind = (depth - x) / depth  # 0 at the nipple, 1 at the chest wall
    aside = (y - geometry.nipple[1]) / (depth * (0.25 + 0.45 * behind.clip(0, 1)))
    score = texture - 8.8 * (behind - 0.35) ** 2 - 0.9 * aside**2
    score -= 3.0 * np.exp(-geometry.from_skin / 5)  # a layer of fat lies under the skin
    score -= 6.0 * geometry.pectoral
    breast = (geometry.from_skin > 0) & (geometry.pectoral < 0.5)
    seen = score[::4, ::4][breast[::4, ::4]]
    threshold = float(np.quantile(seen, 1 - share))  # a NumPy scalar would turn the image to float64
    soft: Image = 1 / (1 + np.exp(-np.clip((score - threshold) / 0.35, -30, 30)))
    return soft.astype(np.float32)


def _expose(image: Image, geometry: Geometry, rng: Rng) -> Image:
    """Thickness falling off at the rim, skin line, black air, focal blur and quantum noise."""
    rim = np.clip(geometry.from_skin / 13, 0, 1)
    thickness = np.sqrt(1 - (1 - rim) ** 2)  # the edge of a compressed breast is about half a circle
    skin = 0.07 * np.exp(-(((geometry.from_skin - 1.0) / 0.7) ** 2))
    image = np.where(geometry.from_skin > 0, image * (0.25 + 0.75 * thickness) + skin, 0.0).astype(np.float32)
    image = cv2.GaussianBlur(image, (0, 0), 0.7)
    grain = cv2.GaussianBlur(rng.standard_normal(image.shape, np.float32), (0, 0), 0.5)
    return image + (0.004 + 0.028 * np.sqrt(image)) * grain
