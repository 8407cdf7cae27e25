"""Which findings a crop shows, against the white that `apply` leaves of a box; and what its report text then tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch

from mama.data import report_text, seen_findings
from mama.data.augment import IDENTITY, apply, draw
from mama.data.images import fit_box, to_canvas
from mama.data.pairs import Pairs
from mama.data.seen_findings import LEAST, as_seen, in_other_view, in_view, share_in_view
from mama.data.wording import statements, statements_of
from mama.settings.schema import AugmentConfig, DataConfig, Fit, Style
from shards.pack.sample import Sample
from shards.schema import Box, Finding, Labels, View
from tests.support.letter_shards import config_of, content, study_of, view_of
from tests.support.shard_folder import write_folder

STYLES = get_args(Style)
SIZE = (256, 128)  # (height, width) of the canvas
CROP = DataConfig(image_size=SIZE, findings="crop")
LEFT = IDENTITY.copy()  # shows the left half of the canvas
LEFT[[0, 2]] = 0.5, -0.5
RIGHT = IDENTITY.copy()
RIGHT[[0, 2]] = 0.5, 0.5
HERE, THERE = (10, 20, 40, 90), (80, 20, 120, 90)  # boxes in the left and in the right half of a canvas-sized image
MALIGNANT = Finding(1, "mass", HERE, "irregular", "spiculated", pathology="malignant")
BENIGN = Finding(2, "calcification", THERE, calcification_type="coarse", pathology="benign")
LABELS = Labels(5, "C", True, "malignant")
NOTHING = "Findings: no mass and no calcification."


def view(*findings: Finding, labels: Labels = LABELS, **facts: Any) -> View:
    return replace(view_of(0, "L"), size=SIZE, labels=labels, findings=findings, **facts)


def told(shown: View, *seen: bool, style: Style = "report", tell: bool = False) -> list[str]:
    """What the text says besides procedure, patient and image."""
    config = replace(CROP, style=style, tell_pathology=tell)
    sentences = seen_findings.text(study_of("L"), shown, seen, config)
    return sentences[3:] if style == "report" else sentences


# What is seen


def white_left(box: Box, stored: tuple[int, int], how: Fit, change: np.ndarray) -> float:
    """The share of a box that is in the view, from the pixels: a white box in a black image, scaled and augmented."""
    image = np.zeros(stored, np.uint8)
    x0, y0, x1, y1 = (int(edge) for edge in box)
    image[y0:y1, x0:x1] = 255
    canvas = to_canvas(image, SIZE, how)
    crop = torch.from_numpy(np.concatenate([change[:6], IDENTITY[6:]]))  # as bright as it was
    view = apply(torch.from_numpy(canvas)[None, None], crop[None])[0, 0]
    enlarged = abs(np.linalg.det(change[[0, 1, 3, 4]].reshape(2, 2).astype(np.float64)))  # canvas for a unit of view
    return float(((view.double() + 1) / 2).sum()) * enlarged / (canvas.sum(dtype=np.float64) / 255)


@pytest.mark.parametrize("how", get_args(Fit))
@pytest.mark.parametrize("stored", [(400, 150), (300, 300), (512, 256)])
@pytest.mark.parametrize(
    "changed",
    [
        {"horizontal_flip": 0.0, "vertical_flip": 0.0},
        {"horizontal_flip": 1.0, "vertical_flip": 0.5},
        {"rotation": 40.0, "horizontal_flip": 0.5},
        {"crop_ratio": (0.3, 3.0), "rotation": 10.0},
    ],
)
def test_the_share_of_a_box_is_that_of_its_white_pixels(
    how: Fit, stored: tuple[int, int], changed: dict[str, Any]
) -> None:
    """Wide and narrow crops are letterboxed in a window that shows more than the crop."""
    off = AugmentConfig(min_tissue=0.0, jitter=0.0, blur=0.0, crop_scale=(0.05, 0.6))
    rng, config = np.random.default_rng(0), replace(off, **changed)
    breast = to_canvas(np.full(stored, 200, np.uint8), SIZE, how)
    shares = []
    for _ in range(60):
        change = draw(config, breast, rng)
        width, height = rng.integers(40, stored[1] // 2), rng.integers(40, stored[0] // 2)
        x, y = rng.integers(0, stored[1] - width), rng.integers(0, stored[0] - height)
        box = (float(x), float(y), float(x + width), float(y + height))
        share = share_in_view(fit_box(box, stored, SIZE, how), change, SIZE)
        assert share == pytest.approx(white_left(box, stored, how, change), abs=0.05)
        shares.append(share)
        shown = replace(view(replace(MALIGNANT, box=box)), size=stored)
        assert in_view(shown, change, replace(CROP, fit=how)) == [share >= LEAST]
    assert min(shares) < 0.1
    assert max(shares) > 0.9
    assert sum(0.1 < share < 0.9 for share in shares) > 10


@pytest.mark.parametrize(("right", "seen"), [(64, True), (74, True), (88, True), (89, False), (120, False)])
def test_half_of_a_box_is_enough_to_be_seen(right: float, seen: bool) -> None:
    """Of a box from column 40 the view has those up to column 64."""
    shown = view(replace(MALIGNANT, box=(40, 5, right, 50)))
    assert in_view(shown, LEFT, CROP) == [seen]
    mirrored = LEFT.copy()
    mirrored[0] *= -1
    assert in_view(shown, mirrored, CROP) == [seen]


def test_a_finding_without_a_box_is_always_seen() -> None:
    shown = view(replace(MALIGNANT, box=None), replace(MALIGNANT, box=THERE), MALIGNANT)
    assert in_view(shown, LEFT, CROP) == [True, False, True]
    assert in_view(shown, RIGHT, CROP) == [True, True, False]


def test_findings_of_the_image_are_all_seen() -> None:
    shown, config = view(MALIGNANT, BENIGN), replace(CROP, findings="image")
    assert in_view(shown, LEFT, config) == in_other_view(shown, shown, LEFT, config) == [True, True]


def test_another_view_of_the_breast_shows_the_findings_whose_number_it_shows() -> None:
    numbered = [replace(MALIGNANT, number=n, box=None if n == 5 else HERE) for n in range(1, 6)]
    other = view(
        replace(BENIGN, number=1, box=HERE),
        replace(BENIGN, number=2, box=THERE),
        replace(BENIGN, number=2, box=None),
        replace(BENIGN, number=3, box=None),  # 4 is not there
        replace(BENIGN, number=5, box=THERE),
        replace(BENIGN, number=6, box=THERE),
    )
    assert in_other_view(view(*numbered), other, LEFT, CROP) == [True, False, True, True, False]
    assert in_other_view(view(*numbered), other, RIGHT, CROP) == [False, True, True, True, True]
    twice = view(replace(BENIGN, number=1, box=THERE), replace(BENIGN, number=1, box=HERE))
    assert in_other_view(view(MALIGNANT), twice, LEFT, CROP) == [True]
    assert in_other_view(view(MALIGNANT), view(*twice.findings[::-1]), LEFT, CROP) == [True]


# What is told


def test_where_all_is_seen_the_facts_are_those_of_the_image() -> None:
    for shown in (view(MALIGNANT, BENIGN), view(), view(labels=Labels(1))):
        assert as_seen(shown, [True] * len(shown.findings)) is shown


def test_a_finding_that_is_cut_away_is_not_told_and_the_labels_stay() -> None:
    unknown = replace(BENIGN, pathology=None)
    assert told(view(MALIGNANT, unknown), True, False) == [
        "Composition: density C, the breast is heterogeneously dense.",
        "Dense tissue may hide small lesions.",
        "Findings: irregular mass, spiculated margin.",
        "Impression: BI-RADS 5, highly suggestive of malignancy.",
        "Overall assessment: malignant.",
    ]
    for findings, seen in (
        ((MALIGNANT, BENIGN), (True, False)),
        ((MALIGNANT, unknown), (False, True)),  # it may be what the label is of
    ):
        left = as_seen(view(*findings), seen)
        assert left.labels == LABELS
        assert left.findings == tuple(one for one, flag in zip(findings, seen, strict=True) if flag)


def test_a_benign_finding_that_is_left_explains_no_malignant_label() -> None:
    unknown, cancer = replace(LABELS, birads=None, cancer=None, pathology=None), Labels(5, "C", cancer=True)
    for cut in (BENIGN, replace(BENIGN, pathology=None), MALIGNANT):
        for labels in (LABELS, cancer, replace(LABELS, cancer=None)):
            assert as_seen(view(BENIGN, cut, labels=labels), (True, False)).labels == unknown
    benign = Labels(2, "C", cancer=False, pathology="benign")
    assert as_seen(view(BENIGN, BENIGN, labels=benign), (True, False)).labels == benign
    assert as_seen(view(BENIGN, MALIGNANT, labels=benign), (True, False)).labels == replace(unknown, density="C")


@pytest.mark.parametrize("more", [(), (replace(BENIGN, box=None),)])
def test_labels_of_a_malignant_finding_that_is_cut_away_are_not_told_of_benign_ones(more: tuple[Finding, ...]) -> None:
    shown, flags = view(MALIGNANT, BENIGN, *more), (False, True, *(True for _ in more))
    left = as_seen(shown, flags)
    assert left.labels == Labels(density="C")
    assert left.findings == (BENIGN, *more)
    assert told(shown, *flags, tell=True)[2:] == ["Findings: coarse calcifications."] * (1 + len(more))
    (sentence,) = told(shown, *flags, style="sentence", tell=True)
    assert sentence.endswith(", and coarse calcifications" * (1 + len(more)) + ".")
    assert told(shown, *flags, style="caption", tell=True) == [
        "Mammogram, side left, view CC, density C, calcification."
    ]


@pytest.mark.parametrize("tell", [False, True])
def test_a_crop_without_any_of_the_findings_shows_no_mass_and_no_calcification(tell: bool) -> None:
    """And nothing of an assessment, of a pathology or of what was cut away, in any style."""
    for labels in (LABELS, replace(LABELS, pathology=None), replace(LABELS, birads=None), Labels(1, "C", False)):
        shown = view(MALIGNANT, BENIGN, labels=labels)
        assert told(shown, False, False, tell=tell)[2:] == [NOTHING]
        assert told(shown, False, False, style="caption", tell=tell) == [
            "Mammogram, side left, view CC, density C, normal."
        ]
        (sentence,) = told(shown, False, False, style="sentence", tell=tell)
        assert sentence.endswith(
            "; it shows breast density C, heterogeneously dense, and no mass and no calcification."
        )


def test_a_finding_without_a_box_keeps_a_crop_from_looking_normal() -> None:
    shown = view(MALIGNANT, replace(BENIGN, box=None, pathology=None))
    seen = in_view(shown, RIGHT, CROP)
    assert told(shown, *seen)[2:4] == [
        "Findings: coarse calcifications.",
        "Impression: BI-RADS 5, highly suggestive of malignancy.",
    ]


@pytest.mark.parametrize("style", STYLES)
def test_images_without_findings_and_a_radiologists_words_are_told_as_before(style: Style) -> None:
    study = study_of("L")
    words = view(MALIGNANT, report="Spiculated mass")
    for shown in (
        words,
        *(view(labels=labels) for labels in (LABELS, Labels(cancer=True), Labels(pathology="normal"))),
    ):
        seen = [False] * len(shown.findings)
        for tell in (False, True):
            config = replace(CROP, style=style, tell_pathology=tell)
            expected = report_text.text(study, shown, style, frozenset({"age"}), tell)
            assert seen_findings.text(study, shown, seen, config, frozenset({"age"})) == expected


def test_statements_of_training_texts_have_those_of_crops() -> None:
    """So that `mama eval` does not call a class untaught that crops alone teach."""
    study, shown = study_of("L"), view(MALIGNANT)
    whole, cropped = (statements_of(study, shown, replace(CROP, findings=what)) for what in ("image", "crop"))
    assert cropped - whole == statements([NOTHING]) - statements(["Findings"])
    assert whole - cropped == set()
    boxless = view(replace(MALIGNANT, box=None))
    assert statements_of(study, boxless, CROP) == whole


# Pairs

# Left CC: a mass and calcifications; left MLO: the mass elsewhere; right CC: two findings of its own, of one number.
FINDINGS = (
    (replace(MALIGNANT, box=(1, 1, 6, 8)), replace(BENIGN, box=(8, 14, 14, 22))),
    (replace(MALIGNANT, box=(6, 15, 12, 22)),),
    (Finding(7, "mass", (4, 2, 12, 9), "round", pathology="malignant"), Finding(7, "calcification", (2, 16, 8, 22))),
)
STORED, GREYS = (24, 16), (200, 160, 120)  # (height, width) of the three images, and their greys
SMALL = AugmentConfig(crop_scale=(0.1, 0.4), rotation=15.0)
# What a report tells of the findings and the category, by which of the findings are seen.
OF_LEFT: dict[tuple[bool, ...], list[str]] = {
    (True, True): ["irregular mass, spiculated margin", "coarse calcifications", "BI-RADS 5"],
    (True, False): ["irregular mass, spiculated margin", "BI-RADS 5"],
    (False, True): ["coarse calcifications"],
    (False, False): ["no mass and no calcification"],
}
OF_RIGHT: dict[tuple[bool, ...], list[str]] = {
    (True, True): ["round mass", "calcifications", "BI-RADS 5"],
    (True, False): ["round mass", "BI-RADS 5"],
    (False, True): ["calcifications", "BI-RADS 5"],
    (False, False): ["no mass and no calcification"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = study_of("LlR", "train0")
    facts = zip(study.views, FINDINGS, strict=True)
    study = replace(study, views=tuple(replace(v, findings=found, labels=LABELS) for v, found in facts))
    images = tuple(cv2.imencode(".jpg", np.full(STORED, grey, np.uint8))[1].tobytes() for grey in GREYS)
    where = tmp_path_factory.mktemp("data") / "shards"
    write_folder(where, {"train": [Sample(study, images, ())]}, per_shard=1)
    return where


def pairs_of(folder: Path, *policies: str, **data: Any) -> Pairs:
    """On a canvas with the proportions of `SIZE`, so that a change shows the same of both."""
    settings = {"findings": "crop", "augment": SMALL, "image_size": (128, 64), **data}
    return Pairs(config_of(folder, pairs=list(policies), **settings))


def number_of(pixels: np.ndarray) -> int:
    """Which of the three images these are."""
    return int(np.abs(np.array(GREYS) - int(pixels.max())).argmin())


def of_findings(sentences: list[str]) -> list[str]:
    """The findings and the category that a report tells."""
    found = [one.removeprefix("Findings: ").removesuffix(".") for one in sentences if one.startswith("Findings")]
    return found + [one.split(": ")[1].split(",")[0] for one in sentences if one.startswith("Impression")]


def by_pixels(number: int, change: np.ndarray, how: Fit) -> tuple[bool, ...] | None:
    """Which findings of an image a view shows, from white pixels of eightfold size; None if one is close to half."""
    boxes = [one.box for one in FINDINGS[number] if one.box]
    enlarged = [(8 * x0, 8 * y0, 8 * x1, 8 * y1) for x0, y0, x1, y1 in boxes]
    shares = [white_left(box, (8 * STORED[0], 8 * STORED[1]), how, change) for box in enlarged]
    return None if any(abs(share - LEAST) < 0.06 for share in shares) else tuple(share > LEAST for share in shares)


def of_own_view(number: int, seen: tuple[bool, ...]) -> list[str]:
    """What the text of an image tells under its own crop."""
    return OF_RIGHT[seen] if number == 2 else OF_LEFT[seen if number == 0 else (*seen, False)]


@pytest.mark.parametrize("how", get_args(Fit))
@pytest.mark.parametrize("policy", ["study", "breast", "contralateral", "augment"])
def test_both_texts_of_a_pair_tell_what_their_crops_show(folder: Path, policy: str, how: Fit) -> None:
    pairs = pairs_of(folder, policy, fit=how)
    outcomes = set()
    for g in range(75):
        pair = pairs[g]
        anchor, partner = number_of(pair.anchor), number_of(pair.partner)
        if seen := by_pixels(anchor, pair.anchor_change, how):
            assert of_findings(pair.anchor_sentences) == of_own_view(anchor, seen)
        if (shown := by_pixels(partner, pair.partner_change, how)) is None:
            continue
        if (anchor, partner) == (0, 1):  # the CC view's text: the mass where the MLO view shows it, the rest stays
            expected = OF_LEFT[shown[0], True]
        elif (anchor, partner) == (1, 0):  # the MLO view's text: the mass where the CC view shows it
            expected = OF_LEFT[shown[0], False]
        else:
            expected = of_own_view(partner, shown)
        assert of_findings(pair.partner_sentences) == expected
        outcomes.add((anchor, partner, *expected))
    pairings = {(anchor, partner) for anchor, partner, *_ in outcomes}
    assert (
        pairings
        == {
            "study": {(a, b) for a in range(3) for b in range(3) if a != b},
            "breast": {(0, 1), (1, 0), (2, 2)},
            "contralateral": {(0, 2), (1, 2), (2, 0), (2, 1)},
            "augment": {(0, 0), (1, 1), (2, 2)},
        }[policy]
    )
    assert all(sum(one[:2] == pairing for one in outcomes) > 1 for pairing in pairings), "seen, and cut away"


def test_a_text_of_crops_depends_on_shards_seed_and_number_alone(folder: Path) -> None:
    forwards, backwards = (pairs_of(folder, "study", "augment") for _ in range(2))
    expected = [content(forwards[g]) for g in range(40)]
    assert [content(backwards[g]) for g in reversed(range(40))] == expected[::-1]


@pytest.mark.parametrize("style", STYLES)
def test_the_setting_changes_texts_alone_and_by_default_they_are_of_the_image(folder: Path, style: Style) -> None:
    settings = {"mask_probability": 0.0, "style": style}
    cropped = pairs_of(folder, "study", "augment", **settings)
    whole = pairs_of(folder, "study", "augment", findings=DataConfig().findings, **settings)
    study, changed = whole.images.study(0), 0
    for g in range(40):
        pair, other = whole[g], cropped[g]
        assert content(pair)[:5] == content(other)[:5]
        v, w = (study.views[number_of(pixels)] for pixels in (pair.anchor, pair.partner))
        assert pair.anchor_sentences == report_text.text(study, v, style)
        assert pair.partner_sentences == report_text.text(study, v if v.laterality == w.laterality else w, style)
        changed += pair.anchor_sentences != other.anchor_sentences
    assert changed > 10
