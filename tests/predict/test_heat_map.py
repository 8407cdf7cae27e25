"""Heat maps in the pixels of the original file, against what single pixels of it do to the canvas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from mama.data import report_text
from mama.data.held_out import Split
from mama.data.images import to_canvas
from mama.data.tokenizer import learn
from mama.errors import ConfigError
from mama.evaluate import localisation
from mama.evaluate.any_kind import AnyKind, sentence_about
from mama.model.mama_model import build
from mama.predict import heat_map
from mama.predict.seen import Seen
from mama.settings.schema import Fit
from shards.image.crop import Geometry
from shards.image.picture import PictureConfig, read_picture
from shards.schema import Finding
from tests.support.oracle_run import oracle_config
from tests.support.tiny_model import tiny

PATCH = 8
CPU = torch.device("cpu")
SIZES = [(211, 150), (97, 173), (40, 25)]  # (height, width) of originals: tall, wide, smaller than the canvas
Geometries = tuple[Geometry, tuple[int, int], Fit]  # of an original of this size, on the canvas


def stored_of(original: np.ndarray, geometry: Geometry) -> np.ndarray:
    x0, y0, x1, y1 = geometry.crop
    small = cv2.resize(original[y0:y1, x0:x1], geometry.size[::-1], interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[:, ::-1] if geometry.flipped else small)


def seen_of(original: np.ndarray, geometry: Geometry, canvas: tuple[int, int], fit: Fit) -> Seen:
    stored = stored_of(original, geometry)
    size = (original.shape[0], original.shape[1])
    return Seen(None, "L", "CC", stored, to_canvas(stored, canvas, fit), size, geometry.to_original,
                geometry.flipped)  # fmt: skip


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED))


def geometry_of(size: tuple[int, int], flipped: bool, crop: bool) -> Geometry:
    height, width = size
    box = (3, 5, width - 4, height - 2) if crop else (0, 0, width, height)
    scale = min(1.0, 61 / max(box[3] - box[1], box[2] - box[0]))
    return Geometry(box, flipped, (round((box[3] - box[1]) * scale), round((box[2] - box[0]) * scale)))


def influence(size: tuple[int, int], geometry: Geometry, canvas: tuple[int, int], fit: Fit, axis: int) -> np.ndarray:
    """For each row (axis 0) or column of the original, how much of it each row or column of patches holds."""
    found = []
    for place in range(size[axis]):
        original = np.zeros(size, np.uint8)
        original[(slice(None),) * axis + (place,)] = 255
        seen = to_canvas(stored_of(original, geometry), canvas, fit).astype(np.float64)
        found.append(seen.sum(1 - axis).reshape(-1, PATCH).sum(1))
    return np.array(found)


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", SIZES)
def test_a_patch_is_where_the_pixels_are_that_it_saw(
    size: tuple[int, int], fit: Fit, flipped: bool, crop: bool
) -> None:
    canvas = (48, 32)
    geometry = geometry_of(size, flipped, crop)
    seen = seen_of(np.full(size, 200, np.uint8), geometry, canvas, fit)
    down, across = (influence(size, geometry, canvas, fit, axis) for axis in (0, 1))
    for row, column in np.ndindex(down.shape[1], across.shape[1]):
        hot = np.zeros((down.shape[1], across.shape[1]), np.float32)
        hot[row, column] = 1
        alone = np.zeros(canvas, np.uint8)
        alone[PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] = 200
        lit = np.isfinite(heat_map.to_original(hot, replace(seen, canvas=alone), canvas, fit))  # no other has tissue
        mapped = heat_map.to_original(hot, seen, canvas, fit)
        assert mapped.shape == size
        if not lit.any():  # the letterbox
            assert heat_map.marks(hot, seen, canvas, fit) == heat_map.Marks(0, 0, None, None)
            continue
        found = heat_map.marks(hot, seen, canvas, fit)
        assert found is not None
        assert found.box is not None
        assert found.peak is not None
        assert lit[found.peak[1], found.peak[0]]
        y, x = np.nonzero(mapped == np.nanmax(mapped))
        assert lit[y, x].all(), "the smooth map is highest there"
        shares = []
        for of_all, place, low, high, step in (
            (down, row, found.box[1], found.box[3], abs(geometry.to_original[4])),
            (across, column, found.box[0], found.box[2], abs(geometry.to_original[0])),
        ):
            own = np.flatnonzero(of_all[:, place])  # the pixels that the patch saw
            assert low <= own[0] <= low + 1 + step, "in the box, which is larger by a stored pixel at most"
            assert high - 2 - step <= own[-1] <= high - 1
            shares.append(of_all[:, place] / np.maximum(of_all.sum(1), 1e-9))
        y, x = np.nonzero(lit)
        assert found.box[0] <= x.min() <= x.max() < found.box[2]
        assert found.box[1] <= y.min() <= y.max() < found.box[3]
        assert lit[(shares[0] > 0.99)[:, None] & (shares[1] > 0.99)].all()
        assert (shares[0][y] > 0).all()
        assert (shares[1][x] > 0).all()
    left = np.zeros(size, bool)
    x0, y0, x1, y1 = geometry.crop
    left[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(np.isfinite(mapped), left)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("size", SIZES)
def test_a_map_is_bilinear_between_the_centres_of_patches(size: tuple[int, int], fit: Fit, flipped: bool) -> None:
    """Against SciPy at the place of the canvas where the light of a pixel of the original goes."""
    canvas, random = (48, 32), np.random.default_rng(4)
    geometry = geometry_of(size, flipped, False)
    seen = seen_of(np.full(size, 200, np.uint8), geometry, canvas, fit)
    values = random.random((6, 4)).astype(np.float32)
    tissue = localisation.patch_means(seen.canvas, (6, 4)) > 8
    mapped = heat_map.to_original(values, seen, canvas, fit)
    centres = []
    for axis in (0, 1):
        middles = []
        for place in range(size[axis]):
            original = np.zeros(size, np.uint8)
            original[(slice(None),) * axis + (place,)] = 255
            light = to_canvas(stored_of(original, geometry), canvas, fit).astype(np.float64).sum(1 - axis)
            middles.append(light @ (np.arange(canvas[axis]) + 0.5) / light.sum())
        centres.append(np.array(middles) / PATCH)
    at = [np.clip(one, 0.5, count - 0.5) - 0.5 for one, count in zip(centres, values.shape, strict=True)]
    places = np.meshgrid(*at, indexing="ij")
    sums, weights = (
        ndimage.map_coordinates(part.astype(np.float64), places, order=1, mode="nearest")
        for part in (np.where(tissue, values, 0), tissue)
    )
    inside = np.isfinite(mapped) & (weights > 0)
    assert inside.mean() > 0.95
    off = np.abs(mapped[inside] - (sums / np.maximum(weights, 1e-9))[inside])
    assert np.median(off) < 0.02, "light is spread over whole pixels of the canvas, an eighth of a patch each"
    assert np.quantile(off, 0.99) < 0.12


def test_an_image_and_its_map_from_file_to_file(tmp_path: Path) -> None:
    """The real picture code, with crop, mirroring and shrinking: the bright spot is where it was."""
    height, width = 1203, 901
    rows, columns = np.mgrid[:height, :width]
    breast = ((columns - width) / 600) ** 2 + ((rows - 620) / 480) ** 2 < 1  # chest wall at the right
    original = np.where(breast, 30, 0).astype(np.uint8)
    original[500:540, 620:670] = 255
    cv2.imwrite(str(tmp_path / "a.png"), original)
    picture = read_picture(tmp_path / "a.png", PictureConfig(long_side=256), "R")
    assert picture.geometry.flipped
    canvas = (128, 80)
    seen = Seen(None, "R", "CC", picture.pixels, to_canvas(picture.pixels, canvas, "letterbox"),
                picture.original_size, picture.geometry.to_original, True)  # fmt: skip
    grey = localisation.patch_means(seen.canvas, (16, 10))
    found = heat_map.marks(grey, seen, canvas, "letterbox")
    assert found is not None
    assert found.peak is not None
    assert found.box is not None
    x0, y0, x1, y1 = found.box
    assert 600 < found.peak[0] < 690
    assert 480 < found.peak[1] < 560
    assert x0 <= 625 < 665 <= x1
    assert y0 <= 505 < 535 <= y1
    assert (x1 - x0) * (y1 - y0) < 40 * 50 * 9
    mapped = heat_map.to_original(grey, seen, canvas, "letterbox")
    assert mapped.shape == original.shape
    assert np.isfinite(mapped[breast]).mean() > 0.98
    assert np.isfinite(mapped[~breast]).mean() < 0.15
    levels = decoded(heat_map.map_png(mapped, found.low, found.high))
    assert (levels.shape, levels.dtype) == (original.shape, np.uint8)
    np.testing.assert_array_equal(levels == 0, np.isnan(mapped))
    inside = levels > 0
    value = found.low + (levels[inside] - 1.0) / 254 * (found.high - found.low)
    np.testing.assert_allclose(value, mapped[inside], atol=(found.high - found.low) / 254 / 1.99)
    assert int(levels[inside].min()) == 1
    assert int(levels.max()) >= 250  # no pixel lies exactly in the middle of the highest patch


def test_maps_without_a_peak_or_a_value() -> None:
    geometry = geometry_of((97, 173), True, True)
    seen = seen_of(np.full((97, 173), 200, np.uint8), geometry, (48, 32), "letterbox")
    flat = np.full((6, 4), 0.25, np.float32)
    assert heat_map.marks(flat, seen, (48, 32), "letterbox") == heat_map.Marks(0.25, 0.25, None, None)
    mapped = heat_map.to_original(flat, seen, (48, 32), "letterbox")
    levels = decoded(heat_map.map_png(mapped, 0.25, 0.25))
    assert set(np.unique(levels)) == {0, 1}
    dark = replace(seen, canvas=np.zeros_like(seen.canvas))
    assert heat_map.marks(flat, dark, (48, 32), "letterbox") is None
    assert np.isnan(heat_map.to_original(flat, dark, (48, 32), "letterbox")).all()


def test_a_map_is_the_one_that_the_evaluation_measures(tmp_path: Path) -> None:
    config = oracle_config(tmp_path)
    split = Split(config, "test")
    words = learn((s for i in split.items for s in report_text.text(i.study, i.view, "report")), 400)
    torch.manual_seed(0)
    config = replace(config, **{name: getattr(tiny(1), name) for name in ("vision", "text", "heads", "loss")})
    shape = config.text.config | {"vocab_size": len(words), "n_positions": 200}
    text = replace(config.text, config=shape, packing=False)
    vision = replace(config.vision, config=config.vision.config | {"image_size": 64})
    model = build(replace(config, text=text, vision=vision), words, "eager").eval()
    assert heat_map.has_maps(model)
    findings = [(Finding(1, "mass"),), (Finding(1, "calcification"),), ()]
    mass, calcification, normal = (sentence_about(about, "report") for about in findings)
    rows = [0, 1, 5]
    sought = localisation.Search([], rows, {}, AnyKind((mass, calcification), normal))
    measured = localisation.maps(model, words, split, sought, config, CPU).any_kind
    canvases = np.stack([split.pixels(split.items[row]) for row in rows])
    asked = [text[number] for text, number in (mass, calcification, normal)]
    pixels = torch.from_numpy(canvases)[:, None].float() / 127.5 - 1
    vectors = heat_map.asked_vectors(model, words, asked, 200, CPU, "report")
    unit, tower, found = heat_map.embed_with_maps(model, pixels, vectors)
    with torch.no_grad():
        torch.testing.assert_close((unit, tower), model.embed_images(pixels))
    assert found.shape == (3, 3, 8, 6)
    np.testing.assert_allclose(np.maximum(found[:, 0], found[:, 1]) - found[:, 2], measured, atol=1e-6)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-3
    assert np.abs(found[:, 1] - found[:, 2]).max() > 1e-3
    needed = len(words.encode(list(localisation.asked_sentence("round mass", "report")[0][:4]), 999).tokens)
    one = ["round mass"]
    assert len(heat_map.asked_vectors(model, words, one, needed, CPU, "report")) == 1
    with pytest.raises(ConfigError, match=f"^'round mass': with the text before it, it has {needed} tokens, and"):
        heat_map.asked_vectors(model, words, one, needed - 1, CPU, "report")
    assert len(heat_map.asked_vectors(model, words, one, 10, CPU, "caption")) == 1


def test_a_sentence_that_is_read_alone_has_the_map_of_those_in_reports() -> None:
    """Whatever a report says before it, and however long that is."""
    words = learn(["no mass and no calcification, density, breast, round"], 300)
    torch.manual_seed(0)
    shape = tiny(1).text.config | {"vocab_size": len(words), "n_positions": 200}
    text = replace(tiny(1).text, config=shape, packing=False)
    for sentences in ("alone", "separator"):
        model = build(replace(tiny(1), text=replace(text, sentences=sentences)), words, "eager").eval()
        reports = [("A breast.", "A round mass."), ("Density D.", "No calcification.", "A round mass.", "Density A.")]
        told = [(report, report.index("A round mass.")) for report in reports]
        with torch.no_grad():
            first, second = localisation.sentence_vectors(model, words, told, 200, CPU)
        (asked,) = heat_map.asked_vectors(model, words, ["A round mass."], 200, CPU, "report")
        same = [torch.allclose(asked, other, atol=1e-6, rtol=0) for other in (first, second)]
        assert same == [sentences == "alone"] * 2
    model = build(replace(tiny(1), text=replace(text, sentences="alone")), words, "eager").eval()
    needed = len(words.encode(["A round mass."], 999).tokens)
    assert len(heat_map.asked_vectors(model, words, ["A round mass."], needed, CPU, "report")) == 1
    with pytest.raises(
        ConfigError, match=f"^'A round mass.': it has {needed} tokens, and the model reads {needed - 1}"
    ):
        heat_map.asked_vectors(model, words, ["A round mass."], needed - 1, CPU, "report")
