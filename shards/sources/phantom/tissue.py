"""Textures of the synthetic breast: fat, fibroglandular tissue, muscle, ligaments, vessels."""

from __future__ import annotations

import cv2
import numpy as np

from shards.sources.phantom.anatomy import HEIGHT, SPACING, WIDTH, Geometry, Image, Rng


def _fractal(rng: Rng) -> Image:
    """Noise of unit variance with the power spectrum of mammograms, about 1/f^3: 0.71 per octave in two dimensions.

    Burgess, Jacobson and Judy, Medical Physics 28 (2001) 419.
    """
    noise: Image = rng.standard_normal((HEIGHT >> 7, WIDTH >> 7), np.float32)
    for octave in range(1, 8):
        height, width = HEIGHT >> (7 - octave), WIDTH >> (7 - octave)
        noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        noise = noise + np.float32(0.71**octave) * rng.standard_normal((height, width), np.float32)
    return (noise - noise.mean()) / noise.std()


def _strands(nipple: tuple[float, float], rng: Rng) -> Image:
    """Ducts and ligaments: noise of unit variance, stretched along the rays that leave the nipple."""
    rays = cv2.GaussianBlur(rng.standard_normal((512, 64), np.float32), (0, 0), sigmaX=0.8, sigmaY=1.6)
    x, y = np.meshgrid(np.arange(WIDTH, dtype=np.float32), np.arange(HEIGHT, dtype=np.float32))
    # The rays meet slightly outside the skin: otherwise they would vanish at the nipple.
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


def draw_tissue(geometry: Geometry, share: float, rng: Rng) -> Image:
    """[H, W], 0..1: fat (about 0.3), glandular tissue and muscle (about 0.55), ligaments and vessels."""
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
    """Cover 0..1 [H, W] of fibroglandular tissue: a cone behind the nipple, broken up by `texture` [H, W]."""
    x = np.arange(WIDTH, dtype=np.float32)[None, :] * SPACING
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] * SPACING
    depth = geometry.nipple[0]
    behind = (depth - x) / depth  # 0 at the nipple, 1 at the chest wall
    aside = (y - geometry.nipple[1]) / (depth * (0.25 + 0.45 * behind.clip(0, 1)))
    score = texture - 8.8 * (behind - 0.35) ** 2 - 0.9 * aside**2
    score -= 3.0 * np.exp(-geometry.from_skin / 5)  # subcutaneous fat
    score -= 6.0 * geometry.pectoral
    breast = (geometry.from_skin > 0) & (geometry.pectoral < 0.5)
    seen = score[::4, ::4][breast[::4, ::4]]
    threshold = float(np.quantile(seen, 1 - share))  # a NumPy scalar would make the image float64
    soft: Image = 1 / (1 + np.exp(-np.clip((score - threshold) / 0.35, -30, 30)))
    return soft.astype(np.float32)
