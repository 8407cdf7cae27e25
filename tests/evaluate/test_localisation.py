"""Boxes from maps, FROC, average precision and box AUC, against hand counts and independent formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from mama.bench.intervals import coverage_of_detection
from mama.bench.simulated_evaluation import IMAGES, simulate_marks, true_detection
from mama.data import report_text
from mama.data.held_out import Item, Split
from mama.data.tokenizer import learn
from mama.evaluate import controls, detection, froc, localisation, pointing
from mama.evaluate.any_kind import AnyKind, sentence_about
from mama.evaluate.arrays import Float32s, Float64s
from mama.evaluate.boxes import NONE, Lesion, centres_inside, lesions, marks, matched, overlaps, strata
from mama.evaluate.detection import Searched
from mama.evaluate.froc import above, average_precision
from mama.settings.schema import Config, EvalConfig
from shards.schema import Box, Finding, Labels
from tests.support.cohort import SIZE, Oracle, study, write_shards
from tests.support.oracle_run import oracle_config
from tests.support.smooth import naive_smooth

Found = Sequence[tuple[float, bool]]  # of each mark its score, and whether it finds a lesion
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
ONE = np.ones(1)


def sensitivities(found: Sequence[float], false: Sequence[float], images: int) -> list[float]:
    above_each = above(np.array(false), np.ones((1, len(false))), np.array(found))
    weights = np.ones((1, len(found))), np.array([float(images)])
    return froc.sensitivities(np.array(found), above_each, *weights, RATES)[:, 0].tolist()


def test_froc_against_hand_counts() -> None:
    """Four images, four lesions: at a quarter of a false mark an image one may be above the threshold, and so on."""
    found = [0.9, 0.7, 0.5, -np.inf]
    assert sensitivities(found, [0.8, 0.6, 0.4, 0.3], 4) == [0.5, 0.75, 0.75, 0.75, 0.75]
    assert sensitivities(found, [0.95, 0.8, 0.6], 4) == [0.25, 0.5, 0.75, 0.75, 0.75]
    assert sensitivities(found, [0.95] * 2 + [0.1], 4) == [0.0, 0.75, 0.75, 0.75, 0.75]
    assert sensitivities(found, [0.7] * 5, 4) == [0.25, 0.25, 0.25, 0.75, 0.75]  # as high as a lesion: not above it
    assert sensitivities([0.9, 0.5], [0.5] * 2, 4) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert sensitivities(found, [], 4) == [0.75] * 5
    assert np.isnan(sensitivities([], [0.5], 4)).all()


def voc(marks: Found, lesions: int) -> float:
    """Average precision read off every threshold: of each recall the best precision at it or a higher one."""
    points = []
    for threshold in {score for score, _ in marks}:
        above = [true for score, true in marks if score >= threshold]
        points.append((sum(above) / lesions, sum(above) / len(above)))
    recalls = sorted({recall for recall, _ in points} | {0.0})
    return sum(
        (after - before) * max(precision for recall, precision in points if recall >= after)
        for before, after in pairwise(recalls)
    )


def ap(marks: Found, lesions: int, weights: Float64s | None = None) -> float:
    scores, true = (np.array(column) for column in zip(*marks, strict=True))
    each = np.ones((1, len(marks))) if weights is None else weights[None]
    finds = true.astype(bool)
    above_each = above(scores, each, scores[finds])
    return float(average_precision(scores[finds], each[:, finds], above_each, np.array([float(lesions)]))[0])


def test_average_precision_against_an_independent_one() -> None:
    assert ap([(0.9, True), (0.8, False), (0.7, True)], 4) == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert ap([(0.5, False)] * 3, 2) == 0
    random = np.random.default_rng(0)
    for _ in range(50):
        count = int(random.integers(1, 30))
        marks = [(float(score), bool(true)) for score, true in
                 zip(random.integers(0, 12, count) / 10, random.random(count) < 0.4, strict=True)]  # fmt: skip
        lesions = sum(true for _, true in marks) + int(random.integers(1, 4))
        assert ap(marks, lesions) == pytest.approx(voc(marks, lesions))
        weights = random.integers(0, 4, count)
        drawn = [mark for mark, times in zip(marks, weights, strict=True) for _ in range(times)]
        if drawn:  # an image that was drawn twice is as good as two such images
            assert ap(marks, 100, weights.astype(float)) == pytest.approx(voc(drawn, 100))


def test_overlaps_and_hits_of_boxes() -> None:
    one = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    other = np.array([[0.0, 0, 10, 10], [9, 4, 11, 6]])
    expected = np.array([[1, 2 / 102], [1 / 3, 4 / 100], [0, 0]])
    np.testing.assert_allclose(overlaps(one, other), expected)
    assert centres_inside(one, other).tolist() == [[True, False], [True, True], [False, False]]
    assert overlaps(one, np.zeros((0, 4))).shape == (3, 0)


def test_each_mark_takes_the_free_lesion_that_it_overlaps_most() -> None:
    overlap = np.array([[0.6, 0.5], [0.9, 0.0], [0.7, 0.3]])
    scores = np.array([0.5, 0.4, 0.9])
    assert matched(overlap, scores, 0.1).tolist() == [1, NONE, 0]  # the third chooses first, then the first
    assert matched(overlap, scores, 0.5).tolist() == [1, NONE, 0]
    assert matched(overlap, scores, 0.55).tolist() == [NONE, NONE, 0]
    assert matched(overlap[:, :0], scores, 0.1).tolist() == [NONE] * 3


def test_box_auc_is_that_of_the_pixels_of_tissue_in_the_smooth_map() -> None:
    """Against scikit-learn, with the pixels of a map by plain loops."""
    random, size, item = np.random.default_rng(1), (48, 32), Item(0, 0, study(1, "test"))
    boxes: tuple[Box, ...] = ((5.0, 9.0, 17.5, 22.0), (20.0, 40.0, 21.0, 41.0))
    inside = np.zeros(size, bool)
    for y, x in np.ndindex(*size):
        inside[y, x] = any(x0 < x + 1 and x < x1 and y0 < y + 1 and y < y1 for x0, y0, x1, y1 in boxes)
    np.testing.assert_array_equal(pointing.touched(boxes, size), inside)
    grey = random.uniform(50, 200, (1, 6, 4)).astype(np.float32)
    grey[0, :2, 2:], grey[0, 5, 0] = 3, 3
    drawn = {"trained": random.random((1, 6, 4)), "steps": random.integers(0, 2, (1, 6, 4))}  # the other with ties
    maps = {name: np.asarray(values, np.float32) for name, values in drawn.items()}
    targets = [pointing.Target(0, item, ["x"], 0, tuple(lesion(*box) for box in boxes))]
    found = pointing.document(maps, grey, targets, size, Config(eval=EvalConfig(bootstrap=0)))
    for row, values in zip(found["rows"], [*maps.values(), grey], strict=True):
        pixels = naive_smooth(np.where(grey[0] > 8, values[0], np.nan), size)
        tissue = np.isfinite(pixels)
        assert tissue.sum() == 8 * 8 * 19
        expected = roc_auc_score(inside[tissue], pixels[tissue].astype(np.float32))
        assert row["box_auc"]["value"] == pytest.approx(expected, abs=1e-4), row["model"]  # of ties by rounding
    assert np.isnan(pointing.pixel_auc(maps["trained"].ravel(), np.zeros(0, np.float32)))
    one, other = (random.integers(0, 9, count).astype(np.float32) for count in (300, 70))
    expected = roc_auc_score([True] * 300 + [False] * 70, np.concatenate([one, other]))
    assert pointing.pixel_auc(one, other) == pytest.approx(expected)


def lesion(*box: float, kind: str = "mass", side: float = 7, millimetres: float | None = None) -> Lesion:
    x0, y0, x1, y1 = box
    return Lesion((x0, y0, x1, y1), kind, side, millimetres)


def test_sizes_are_in_millimetres_where_all_have_a_spacing() -> None:
    view = replace(study(1, "test").views[0], pixel_spacing=(0.5, 0.25), to_original=(-2.0, 0, 96.0, 0, 3.0, 0))
    findings = [Finding(1, "mass", (4.0, 8.0, 14.0, 16.0)), Finding(1, "distortion", (4.0, 8.0, 14.0, 16.0)),
                Finding(2, "mass")]  # fmt: skip
    (found,) = lesions(view, findings, SIZE, "letterbox")
    assert (found.kind, found.side, found.millimetres) == ("mass", 100 * 10 / 64, 8 * 3 * 0.5)
    (bare,) = lesions(replace(view, pixel_spacing=None), findings, SIZE, "letterbox")
    assert bare.millimetres is None
    both = strata([found, replace(found, kind="calcification", millimetres=20.5)])
    names = ["all", "calcification", "mass", "up to 10 mm", "10 to 20 mm", "over 20 mm"]
    assert [one.name for one in both] == names
    assert [one.holds(found) for one in both] == [True, False, True, False, True, False]
    told = [
        replace(finding, pathology=name) for finding, name in zip(findings[:2], ("malignant", "benign"), strict=True)
    ]
    (worst,) = lesions(view, told[::-1], SIZE, "letterbox")
    assert (worst.kind, worst.pathology, found.pathology) == ("distortion", "malignant", None)
    by_pathology = strata([worst, replace(worst, pathology="benign"), worst])[-2:]
    assert [(one.by, one.name, one.holds(worst)) for one in by_pathology] == [
        ("pathology", "benign", False), ("pathology", "malignant", True),
    ]  # fmt: skip
    assert all(one.by != "pathology" for one in strata([worst, found]))
    percent = strata([found, bare])
    assert [one.name.split(" %")[0] for one in percent[-3:]] == ["up to 5", "5 to 10", "over 10"]
    assert [one.holds(found) for one in percent[-3:]] == [False, False, True]


def test_images_with_lesions_whose_boxes_are_not_known_are_left_out() -> None:
    sick, healthy = study(1, "test").views
    assert detection.is_complete(sick)
    assert detection.is_complete(healthy)
    assert not detection.is_complete(replace(sick, findings=(*sick.findings, Finding(2, "mass"))))
    assert not detection.is_complete(replace(sick, findings=()))
    known = [Labels(birads=1), Labels(2, cancer=False), Labels(pathology="normal"), Labels(), Labels(density="C")]
    unknown = [Labels(birads=0), Labels(birads=4), Labels(cancer=True), Labels(pathology="benign")]
    assert [detection.is_complete(replace(healthy, labels=labels)) for labels in known] == [True] * 5
    assert [detection.is_complete(replace(healthy, labels=labels)) for labels in unknown] == [False] * 4


def detected(maps: Float32s, of_images: list[tuple[Lesion, ...]], patients: str, resamples: int = 0) -> dict[str, Any]:
    config = Config(eval=EvalConfig(bootstrap=resamples))
    grey = np.full(maps.shape, 100, np.float32)
    boxes = detection.boxes_of_maps({"trained": maps}, grey, (40, 40), config.seed)
    return detection.document(boxes, Searched(list(patients), of_images), config)


def test_detection_from_maps_to_figures_by_kind_and_size() -> None:
    maps = np.zeros((4, 4, 4), np.float32)
    maps[0, 0, 0], maps[0, 3, 3] = 0.9, 0.6  # finds the mass, and marks nothing
    maps[1, 1, 1] = 0.8  # no lesion there
    maps[2, 2, 1:3] = 0.7  # 20 x 10 pixels around the calcifications of 10 x 10: overlap 1/2, centre at their edge
    large = lesion(0, 20, 40, 40, side=50)  # overlaps with nothing by half
    images = [(lesion(0, 0, 10, 10),), (), (lesion(20, 20, 30, 30, kind="calcification", side=3),), (large,)]
    found = detected(maps, images, "aabc")
    (trained, brightest, _) = found["rows"]
    assert (found["images"], found["without_lesion"], found["lesions"], found["patients"]) == (4, 1, 3, 3)
    assert (trained["marks"], trained["curve"]["false_positives"][-1], brightest["marks"]) == (4, 0.5, 0)
    shares = [one["sensitivity"]["value"] for one in trained["froc"]]
    assert shares == pytest.approx([2 / 3] * 5)  # one false mark of 0.8 is allowed at 0.25 an image: 0.7 is above 0.6
    assert trained["ap"]["0.5"]["value"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    kinds = {one["name"]: one for one in found["strata"]}
    assert {name: one["lesions"] for name, one in kinds.items()} == {
        "mass": 2, "calcification": 1, "up to 5 % of the image's height": 1,
        "5 to 10 % of the image's height": 1, "over 10 % of the image's height": 1,
    }  # fmt: skip
    mass, calcification = (kinds[name]["rows"][0] for name in ("mass", "calcification"))
    assert mass["ap"]["0.5"]["value"] == 0.5  # the mark on the calcifications does not count
    assert calcification["ap"]["0.5"]["value"] == 0.5  # nor that on the mass; the false one is above it
    assert [one["sensitivity"]["value"] for one in calcification["froc"]] == [1.0] * 5
    assert kinds["over 10 % of the image's height"]["rows"][0]["froc"][4]["sensitivity"]["value"] == 0.0
    assert trained["curve"]["sensitivity"][0] == pytest.approx(1 / 3)
    assert trained["curve"]["sensitivity"][-1] == pytest.approx(2 / 3)


def test_intervals_are_those_of_figures_on_patients_drawn_again() -> None:
    """A resample has the figures of a data set in which each patient is as often as he was drawn."""
    random = np.random.default_rng(3)
    maps = random.random((12, 4, 4)).astype(np.float32) ** 3
    boxes = 10 * np.concatenate([random.integers(0, 2, (12, 2)), random.integers(3, 5, (12, 2))], axis=1)
    images: list[tuple[Lesion, ...]] = [(lesion(*box),) if n % 3 else () for n, box in enumerate(boxes)]
    patients = "aabbccddeeff"
    searched = Searched(list(patients), images)
    marked = detection._match([marks(one, np.ones((4, 4), bool), (40, 40)) for one in maps], searched)
    own = np.ones(sum(map(len, images)), bool)
    at = np.repeat(np.arange(12), [len(one) for one in images])
    drawn = np.repeat([0, 3, 1, 0, 2, 1], 2).astype(float)  # how often each image was drawn
    got = detection._measure(marked, [own], ONE * drawn.sum(), drawn[None, at], drawn[None, marked.image])[:, 0]
    rows = np.repeat(np.arange(12), drawn.astype(int))
    again = detected(maps[rows], [images[row] for row in rows], "".join(patients[row] for row in rows))["rows"][0]
    expected = [one["value"] for one in again["ap"].values()] + [one["sensitivity"]["value"] for one in again["froc"]]
    np.testing.assert_allclose(got, expected)
    assert len(set(np.round(got, 6))) > 3
    (row, *_) = detected(maps, images, patients, resamples=200)["rows"]
    for one in (row["ap"]["0.1"], row["froc"][2]["sensitivity"]):
        assert 0 <= one["low"] < one["value"] < one["high"] <= 1


@pytest.mark.parametrize("area", [0.75, 0.97])
def test_the_simulated_truth_of_a_detection_is_that_of_a_large_cohort(area: float) -> None:
    found, of_images = simulate_marks(np.random.default_rng(2), 1500, 0.5, area)
    searched = Searched([str(n // IMAGES) for n in range(len(found))], of_images)
    (row,) = detection.document({"x": found}, searched, Config(eval=EvalConfig(bootstrap=0)))["rows"]
    precision, shares = true_detection(0.5, area, RATES[:3])
    assert row["ap"]["0.25"]["value"] == pytest.approx(precision, abs=0.03)
    assert [one["sensitivity"]["value"] for one in row["froc"][:3]] == pytest.approx(shares, abs=0.03)


def test_95_of_100_intervals_of_a_detection_hold_the_true_value() -> None:
    """The standard error of a share of 40 is 0.034."""
    found = coverage_of_detection(30, 0.5, 0.9, rounds=40, resamples=60)
    assert len(found) == 3
    for name, (held, length) in found.items():
        assert held > 0.84, name
        assert length < 0.6, name


def test_pointing_by_kind_has_the_targets_of_that_kind() -> None:
    """A sentence about two kinds points at the lesions of one at a time; the other's count as neither in nor out."""
    item = Item(0, 0, study(1, "test"))
    both = (lesion(0, 0, 8, 8), lesion(24, 24, 32, 32, kind="calcification"))
    targets = [pointing.Target(0, item, ["x"], 0, both), pointing.Target(0, item, ["x"], 0, both[:1])]
    maps = np.zeros((2, 4, 4), np.float32)
    maps[:, 0, 0], maps[:, 3, 3] = 0.8, 1.0
    grey = np.full((2, 4, 4), 100, np.float32)
    found = pointing.document({"trained": maps}, grey, targets, (32, 32), Config(eval=EvalConfig(bootstrap=0)))
    by_name = {one["name"]: one for one in found["strata"]}
    assert [one["findings"] for one in (found, by_name["mass"], by_name["calcification"])] == [2, 2, 1]
    rates = [one["rows"][0]["hit_rate"]["value"] for one in (found, by_name["mass"], by_name["calcification"])]
    assert rates == [0.5, 0, 1]
    areas = [one["rows"][0]["box_auc"]["value"] for one in (found, by_name["mass"], by_name["calcification"])]
    pixels, corners = naive_smooth(maps[0], (32, 32)), np.zeros((2, 32, 32), bool)
    corners[0, :8, :8], corners[1, 24:, 24:] = True, True
    (first, other), whole = corners, np.ones((32, 32), bool)
    both_in, first_in, other_in, alone = (
        roc_auc_score(true[among], pixels[among])
        for true, among in ((first | other, whole), (first, ~other), (other, ~first), (first, whole))
    )
    assert areas == pytest.approx([(both_in + alone) / 2, (first_in + alone) / 2, other_in], abs=1e-6)
    assert by_name["up to 5 % of the image's height"]["findings"] == 0
    assert by_name["up to 5 % of the image's height"]["rows"][0]["hit_rate"]["value"] is None


def test_strict_hits_are_patches_that_share_pixels_with_a_box() -> None:
    """Against pixels: hits are patches that share one with a box, or touch such a patch; of the tissue alone."""
    random, item = np.random.default_rng(5), Item(0, 0, study(1, "test"))
    maps, grey = random.random((40, 6, 4)).astype(np.float32), np.full((40, 6, 4), 100, np.float32)
    grey[:, :, 3] = 0
    targets, hits, strict, chances = [], [], [], []
    for values in maps:
        x0, y0 = random.uniform(0, 20), random.uniform(0, 36)
        box = (x0, y0, x0 + random.uniform(2, 12), y0 + random.uniform(2, 12))
        targets.append(pointing.Target(0, item, ["x"], 0, (lesion(*box),)))
        shared = np.zeros((6, 4), bool)
        for row, column in np.ndindex(6, 4):
            down = min(box[3], 8 * row + 8) - max(box[1], 8 * row)
            across = min(box[2], 8 * column + 8) - max(box[0], 8 * column)
            shared[row, column] = down > 0 and across > 0
        peak = np.unravel_index(values.argmax(), values.shape)
        strict.append(shared[peak])
        hits.append(ndimage.binary_dilation(shared, np.ones((3, 3)))[peak])
        chances.append(shared[:, :3].mean())
    found = pointing.document({"trained": maps}, grey, targets, (48, 32), Config(eval=EvalConfig(bootstrap=0)))
    row = found["rows"][0]
    assert row["hit_rate"]["value"] == pytest.approx(np.mean(hits))
    assert row["strict_hit_rate"]["value"] == pytest.approx(np.mean(strict))
    assert found["strict_chance"] == pytest.approx(np.mean(chances))
    assert 0 < np.mean(strict) < np.mean(hits) < 1


def test_a_patch_that_was_not_computed_is_never_pointed_at() -> None:
    """Its value is NaN: the figures are those of a map that is lowest there."""
    item, box = Item(0, 0, study(1, "test")), (lesion(0, 0, 8, 8),)
    grey = np.full((1, 4, 4), 100, np.float32)
    grey[:, :, 2:] = 0
    maps = np.random.default_rng(0).random((1, 4, 4), dtype=np.float32)
    maps[0, 0, 0] = 0.9
    found = []
    for value in (np.nan, -1.0):
        maps[:, :, 2:] = value
        figures = pointing.document(
            {"trained": maps},
            grey,
            [pointing.Target(0, item, ["x"], 0, box)],
            (32, 32),
            Config(eval=EvalConfig(bootstrap=0)),
        )
        (boxes,) = detection.boxes_of_maps({"trained": maps}, grey, (32, 32), 0)["trained"]
        found.append((figures, [part.tolist() for part in boxes]))
    assert found[0] == found[1]
    assert found[0][0]["rows"][0]["hit_rate"]["value"] == 1


def test_what_is_looked_for_and_in_which_images(tmp_path: Path) -> None:
    config = oracle_config(tmp_path)
    split = Split(config, "test")
    tokenizer = learn((s for i in split.items for s in report_text.text(i.study, i.view, "report")), 400)
    found = localisation.search(split, tokenizer, 200, config.loss)
    assert found.rows == list(range(len(split.items)))
    assert [target.row for target in found.targets] == [2, 6, 10, 14, 18, 22][: len(found.targets)]
    calcification, mass, distortion = (
        sentence_about((Finding(1, kind),), "report") for kind in ("calcification", "mass", "distortion")
    )
    both = localisation.Search(found.targets, found.rows, any_kind=AnyKind((calcification, mass), distortion))
    maps = localisation.maps(Oracle(tokenizer), tokenizer, split, both, config, torch.device("cpu"))  # type: ignore[arg-type]
    seen = maps.grey / 127.5 - 1  # by the mass; the others see the opposite
    np.testing.assert_allclose(maps.any_kind, abs(seen) + seen, atol=1e-5)
    np.testing.assert_allclose(maps.own, maps.grey[[target.row for target in found.targets]] / 127.5 - 1, atol=1e-5)
    assert {one.name for one in found.controls.made} == {"no finding"}
    wrong = [(calcification, -1), (mass, 1), (distortion, -1)]  # of the last target, twice of the one before
    targets = [len(found.targets) - 2, len(found.targets) - 2, len(found.targets) - 1]
    made = [controls.Control(n, "x", *sentence) for n, (sentence, _) in zip(targets, wrong, strict=True)]
    asked = localisation.Search(found.targets, found.rows, controls=controls.Controls(made))
    maps = localisation.maps(Oracle(tokenizer), tokenizer, split, asked, config, torch.device("cpu"))  # type: ignore[arg-type]
    grey = maps.grey[[found.targets[n].row for n in targets]] / 127.5 - 1
    np.testing.assert_allclose(maps.controls, grey * np.array([sign for _, sign in wrong])[:, None, None], atol=1e-5)
    cut = localisation.search(split, tokenizer, 20, config.loss)
    assert (cut.targets, cut.rows, cut.any_kind) == ([], [], None)
    write_shards(tmp_path / "words", {"test": 4}, words="Enhancing mass")
    words = Split(replace(config, data=replace(config.data, shards=[str(tmp_path / "words")])), "test")
    bare = localisation.search(words, tokenizer, 200, config.loss)
    assert [target.row for target in bare.targets] == [2, 6]
    assert bare.rows == list(range(8))  # with those that are free of lesions
    assert bare.complete == {}
