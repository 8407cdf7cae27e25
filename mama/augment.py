"""Augmentation: parameters are drawn per image on the CPU, applied to the whole batch on the device.

A parameter row is (a, b, c, d, e, f, gain, bias, blur): the 2 x 3 affine that takes an output
position to an input position in `grid_sample`'s coordinates ([-1, 1] over the image), intensity
gain and bias on [0, 1], and the blur's sigma in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mama.config import AugmentConfig

PARAMETERS = 9
BLUR_RADIUS = 3
IDENTITY = np.array([1, 0, 0, 0, 1, 0, 1, 0, 0], dtype=np.float32)


def draw(config: AugmentConfig, image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One image's parameters, float32 [9]: random resized crop, flips, rotation, intensity, blur.

    `image_size` (H, W) lets a rotation turn pixels, not the stretched unit square, by its angle.
    """
    area = rng.uniform(*config.crop_scale)
    aspect = math.exp(rng.uniform(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])))
    aspect = min(max(aspect, area), 1 / area)  # else a crop of this area is wider or higher than the image
    width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
    x, y = rng.uniform(width - 1, 1 - width), rng.uniform(height - 1, 1 - height)
    angle = math.radians(rng.uniform(-config.rotation, config.rotation))
    flip_x = -1.0 if rng.random() < config.horizontal_flip else 1.0
    flip_y = -1.0 if rng.random() < config.vertical_flip else 1.0
    cos, sin, tall = math.cos(angle), math.sin(angle), image_size[0] / image_size[1]
    affine = [
        *(width * cos * flip_x, -width * sin * tall * flip_y, x),
        *(height * sin / tall * flip_x, height * cos * flip_y, y),
    ]
    gain, bias, blur = 1.0, 0.0, 0.0
    if rng.random() < config.jitter:
        gain = rng.uniform(1 - config.jitter_strength, 1 + config.jitter_strength)
        bias = rng.uniform(-config.jitter_strength, config.jitter_strength) / 2
    if rng.random() < config.blur:
        blur = rng.uniform(0.1, 1.5)
    return np.array([*affine, gain, bias, blur], dtype=np.float32)


def apply(images: Tensor, parameters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [b, 1, H, W] and float32 [b, 9] -> `dtype` [b, 1, H, W] in [-1, 1], blurred in `dtype`.

    Positions outside the input read as air (0). Sampling and brightness are float32 always: bfloat16 knows a
    position in 518 pixels to two of them only. In bfloat16 the result differs by 0.02 at most, 2.5 of 255 grey levels.
    """
    pixels = images.float() / 255
    grid = F.affine_grid(parameters[:, :6].reshape(-1, 2, 3), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain, bias = parameters[:, 6, None, None, None], parameters[:, 7, None, None, None]
    air = pixels <= 0  # brightness is the breast's, the air around it stays black
    pixels = (pixels * gain + bias).clamp(0, 1).masked_fill(air, 0)
    return _blur(pixels.to(dtype), parameters[:, 8]) * 2 - 1


def normalise(images: Tensor) -> Tensor:
    """uint8 [b, 1, H, W] -> float32 in [-1, 1], without any augmentation."""
    return images.float() / 127.5 - 1


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur with one sigma per image; sigma 0 is the identity.

    The edge is repeated outwards: behind the chest wall there is tissue that the image does not show, no air.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=pixels.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))  # [b, k]
    weights = (weights / weights.sum(1, keepdim=True)).to(pixels.dtype)
    images = pixels.transpose(0, 1)  # [1, b, H, W]: one group per image
    images = F.pad(images, (BLUR_RADIUS,) * 4, mode="replicate")
    images = F.conv2d(images, weights[:, None, :, None], groups=len(pixels))
    images = F.conv2d(images, weights[:, None, None, :], groups=len(pixels))
    return images.transpose(0, 1)
