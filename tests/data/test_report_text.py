"""The report of an image, word for word, from the facts that are known of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pytest

from mama.data import report_text
from shards.schema import Finding, Labels, Study, View
from shards.sources.cdd_cesm import cdd_cesm
from shards.sources.phantom.studies import _birads, _lesions

MASS = Finding(1, "mass", None, "irregular", "spiculated", "high", pathology="malignant")
SPECKS = Finding(2, "calcification", calcification_type="fine pleomorphic", distribution="grouped")
STUDY = Study("key", "patient", "invented", "train", (), 61, "White", "Hispanic or Latino", "screening")
MEANINGS = {
    0: ("incomplete, more imaging is needed", "undecided"),
    1: ("negative", "healthy"),
    2: ("benign", "benign"),
    3: ("probably benign", "likely benign"),
    4: ("suspicious", "suspect"),
    5: ("highly suggestive of malignancy", "malignant"),
    6: ("biopsy-proven malignancy", "malignant"),
}
FACTS = {
    "age": ("Patient: age {}, race White, ethnicity Hispanic or Latino.", "61 years"),
    "race": ("Patient: age 61 years, race {}, ethnicity Hispanic or Latino.", "White"),
    "ethnicity": ("Patient: age 61 years, race White, ethnicity {}.", "Hispanic or Latino"),
    "type": ("Image: type {}, side left, view MLO.", "2D"),
    "side": ("Image: type 2D, side {}, view MLO.", "left"),
    "view": ("Image: type 2D, side left, view {}.", "MLO"),
}


def view(
    labels: Labels | None = None,
    findings: tuple[Finding, ...] = (),
    words: str | None = None,
    side: str = "L",
    position: str = "MLO",
) -> View:
    return View(
        member="0.jpg",
        laterality=side,
        view=position,
        size=(8, 6),
        original_size=(8, 6),
        pixel_spacing=None,
        crop=(0, 0, 6, 8),
        flipped=False,
        to_original=(1, 0, 0, 0, 1, 0),
        labels=labels or Labels(),
        findings=findings,
        report=words,
    )


WHOLE = view(Labels(5, "C", True, "malignant"), (MASS, SPECKS))


def test_a_report_says_everything_in_the_order_of_the_method() -> None:
    assert report_text.report(STUDY, WHOLE) == [
        "Procedure: screening mammogram.",
        "Patient: age 61 years, race White, ethnicity Hispanic or Latino.",
        "Image: type 2D, side left, view MLO.",
        "Composition: density C, the breast is heterogeneously dense.",
        "Dense tissue may hide small lesions.",
        "Findings: irregular mass, spiculated margin, high density.",
        "Findings: fine pleomorphic calcifications, grouped distribution.",
        "Impression: BI-RADS 5, highly suggestive of malignancy.",
        "Overall assessment: malignant.",
    ]


def test_no_text_tells_an_implant() -> None:
    for style in (report_text.report, report_text.natural_sentence, report_text.caption):
        texts = [style(STUDY, replace(WHOLE, implant=known)) for known in (True, False, None)]
        assert texts == texts[:1] * 3


def test_what_is_unknown_is_left_out_or_called_unknown_but_never_guessed() -> None:
    stranger = replace(STUDY, age=None, race=None, ethnicity=None, reason=None)
    assert report_text.report(stranger, view()) == [
        "Procedure: mammogram.",
        "Patient: age unknown, race unknown, ethnicity unknown.",
        "Image: type 2D, side left, view MLO.",
    ]


@pytest.mark.parametrize("missing", ["density", "birads", "findings"])
def test_a_missing_fact_takes_only_its_own_sentences(missing: str) -> None:
    starts = {
        "density": ("Composition", "Dense tissue"),
        "birads": ("Impression", "Overall assessment"),
        "findings": ("Findings",),
    }[missing]
    less = replace(WHOLE, findings=()) if missing == "findings" else WHOLE
    findings = ["Findings: abnormality highly suggestive of malignancy."] if missing == "findings" else []
    if missing != "findings":
        less = replace(WHOLE, labels=replace(WHOLE.labels, **{missing: None}))
    expected = [sentence for sentence in report_text.report(STUDY, WHOLE) if not sentence.startswith(starts)]
    assert len(expected) == 9 - 2
    assert report_text.report(STUDY, less) == expected[:5] + findings + expected[5:]


@pytest.mark.parametrize(
    ("density", "words", "dense"),
    [
        ("A", "almost entirely fatty", False),
        ("B", "scattered fibroglandular tissue", False),
        ("C", "heterogeneously dense", True),
        ("D", "extremely dense", True),
    ],
)
def test_only_dense_breasts_carry_the_warning(density: str, words: str, dense: bool) -> None:
    sentences = report_text.composition(view(Labels(density=density)))
    assert sentences[0] == f"Composition: density {density}, the breast is {words}."
    assert sentences[1:] == (["Dense tissue may hide small lesions."] if dense else [])


@pytest.mark.parametrize("birads", range(7))
def test_every_bi_rads_category_has_its_meaning_and_its_assessment(birads: int) -> None:
    meaning, overall = MEANINGS[birads]
    assert report_text.impression(view(Labels(birads))) == [
        f"Impression: BI-RADS {birads}, {meaning}.",
        f"Overall assessment: {overall}.",
    ]


def test_age_0_and_bi_rads_0_are_values_and_not_absent() -> None:
    sentences = report_text.report(replace(STUDY, age=0), view(Labels(0)))
    assert sentences[1].startswith("Patient: age 0 years,")
    assert "Impression: BI-RADS 0, incomplete, more imaging is needed." in sentences


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (MASS, "irregular mass, spiculated margin, high density"),
        (Finding(1, "mass"), "mass"),
        (Finding(1, "mass", shape="oval"), "oval mass"),
        (Finding(1, "mass", margin="circumscribed"), "mass, circumscribed margin"),
        (Finding(1, "mass", density="low"), "mass, low density"),
        (Finding(1, "asymmetry"), "asymmetry"),
        (Finding(1, "distortion", density="equal"), "distortion, equal density"),
        (SPECKS, "fine pleomorphic calcifications, grouped distribution"),
        (Finding(1, "calcification"), "calcifications"),
        (Finding(1, "calcification", calcification_type="coarse"), "coarse calcifications"),
        (Finding(1, "calcification", distribution="linear"), "calcifications, linear distribution"),
    ],
)
def test_a_finding_is_told_in_the_descriptors_that_are_known(finding: Finding, words: str) -> None:
    assert report_text.findings(view(findings=(finding,))) == [f"Findings: {words}."]


def test_the_pathology_of_a_finding_is_never_told() -> None:
    """It is what a task asks for, and no radiologist sees it in an image."""
    texts = [
        report_text.report(STUDY, view(findings=(replace(MASS, pathology=p),))) for p in (None, "benign", "malignant")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_findings_keep_their_order() -> None:
    one, two = (report_text.findings(view(findings=pair)) for pair in ((MASS, SPECKS), (SPECKS, MASS)))
    assert one == two[::-1]
    assert len(one) == 2


@pytest.mark.parametrize(
    ("labels", "sentences"),
    [
        (Labels(1), ["Findings: no mass and no calcification."]),
        (Labels(pathology="normal"), ["Findings: no mass and no calcification."]),
        (Labels(2, pathology="normal"), ["Findings: no mass and no calcification."]),
        (Labels(pathology="benign"), []),
        (Labels(cancer=False), []),
        (Labels(), []),
    ],
)
def test_only_a_breast_called_normal_is_described_as_empty(labels: Labels, sentences: list[str]) -> None:
    assert report_text.findings(view(labels)) == sentences


@pytest.mark.parametrize(
    ("birads", "words", "sentence"),
    [
        (0, "area that needs more imaging", "an area that needs more imaging"),
        (2, "benign finding", "a benign finding"),
        (3, "probably benign finding", "a probably benign finding"),
        (4, "suspicious abnormality", "a suspicious abnormality"),
        (5, "abnormality highly suggestive of malignancy", "an abnormality highly suggestive of malignancy"),
        (6, "biopsy-proven malignancy", "a biopsy-proven malignancy"),
    ],
)
def test_an_assessment_without_descriptors_says_what_was_found(birads: int, words: str, sentence: str) -> None:
    """In every style, and only there: descriptors and a radiologist's words say it better."""
    bare = view(Labels(birads))
    assert f"Findings: {words}." in report_text.text(STUDY, bare, "report")
    assert (
        f"; it shows {sentence}; it is assessed as BI-RADS {birads}, " in report_text.text(STUDY, bare, "sentence")[0]
    )
    assert report_text.text(STUDY, bare, "caption") == [f"Mammogram, side left, view MLO, {words}, BI-RADS {birads}."]
    for known in (
        replace(bare, findings=(MASS,)),
        replace(bare, report="Ödem"),
        view(Labels(birads, None, None, "normal")),
    ):
        for style in get_args(report_text.Style):
            sentences = [s for s in report_text.text(STUDY, known, style) if not s.startswith("Impression")]
            assert words not in " ".join(sentences).partition("; it is assessed")[0]


def test_pathology_is_told_only_where_it_may_be_and_nothing_else_is_known() -> None:
    """Nobody sees it in an image, so it never appears beside findings that were seen there."""
    for labels, outcome in (
        (Labels(pathology="malignant"), "malignant"),
        (Labels(None, "C", False, "benign"), "benign"),
        (Labels(pathology="normal"), "normal"),
        (Labels(cancer=True), "malignant"),
        (Labels(cancer=False), "not malignant"),
    ):
        for style, words in (
            ("report", f"Pathology: {outcome}."),
            ("sentence", f"; its pathology is {outcome}."),
            ("caption", f", pathology {outcome}."),
        ):
            alone = report_text.text(STUDY, view(labels), style, tell_pathology=True)  # type: ignore[arg-type]
            assert alone[-1].endswith(words)
            without = report_text.text(STUDY, view(labels), style)  # type: ignore[arg-type]
            assert "athology" not in " ".join(without)
            assert "malignan" not in " ".join(without)
            for known in (view(replace(labels, birads=4)), view(labels, (MASS,)), view(labels, words="Ödem")):
                without = report_text.text(STUDY, known, style)  # type: ignore[arg-type]
                assert report_text.text(STUDY, known, style, tell_pathology=True) == without  # type: ignore[arg-type]
    for style in get_args(report_text.Style):
        nothing = view(Labels(density="A"))
        assert report_text.text(STUDY, nothing, style, tell_pathology=True) == report_text.text(STUDY, nothing, style)


def test_a_radiologists_words_stand_as_they_are_in_the_place_of_the_findings() -> None:
    words = "Heterogenously enhancing mass, 12 x 9 mm\n\n  Ödem der Haut  \n"
    assert report_text.findings(view(Labels(1), (MASS,), words)) == [
        "Findings: Heterogenously enhancing mass, 12 x 9 mm.",
        "Findings: Ödem der Haut.",
    ]
    sentences = report_text.report(STUDY, view(Labels(4, "A"), words="Something"))
    assert [s.partition(":")[0] for s in sentences] == [
        "Procedure", "Patient", "Image", "Composition", "Findings", "Impression", "Overall assessment",
    ]  # fmt: skip


def test_a_sentence_that_ends_in_a_full_stop_gets_no_second_one() -> None:
    assert report_text.findings(view(words="No mass.\nNo calcification.")) == [
        "Findings: No mass.",
        "Findings: No calcification.",
    ]


def test_the_sentences_that_tell_a_finding_are_those_of_the_findings() -> None:
    everything = [
        view(Labels(birads, "C"), found, words)
        for birads in (None, *range(7))
        for found in ((), (MASS,), (MASS, SPECKS))
        for words in (None, "A mass.\nFindings: as before.\nImpression: none.")
    ]
    told = 0
    for one in everything:
        sentences = report_text.report(STUDY, one, ending="benign")
        expected = report_text.findings(one)
        assert [s for s in sentences if report_text.tells_finding(s)] == expected
        told += bool(expected)
    assert told == len(everything) - 1  # of one image nothing is known


def test_an_empty_report_does_not_hide_the_findings() -> None:
    assert report_text.findings(view(findings=(MASS,), words=" \n")) == report_text.findings(view(findings=(MASS,)))


@pytest.mark.parametrize(("side", "word"), [("L", "left"), ("R", "right")])
@pytest.mark.parametrize("position", ["CC", "MLO"])
@pytest.mark.parametrize("reason", ["screening", "diagnostic"])
def test_side_view_and_reason_are_those_of_the_image(side: str, word: str, position: str, reason: str) -> None:
    sentences = report_text.report(replace(STUDY, reason=reason), view(side=side, position=position))
    assert sentences[0] == f"Procedure: {reason} mammogram."
    assert sentences[2] == f"Image: type 2D, side {word}, view {position}."


@pytest.mark.parametrize("name", FACTS)
def test_a_hidden_name_reads_unknown_and_nothing_else_changes(name: str) -> None:
    template, shown = FACTS[name]
    whole = report_text.report(STUDY, WHOLE)
    masked = report_text.report(STUDY, WHOLE, frozenset({name}))
    line = whole.index(template.format(shown))
    assert masked[line] == template.format("unknown")
    assert masked[:line] + masked[line + 1 :] == whole[:line] + whole[line + 1 :]


def test_with_everything_hidden_only_the_image_speaks() -> None:
    masked = report_text.report(STUDY, WHOLE, frozenset(report_text.META))
    assert masked[1] == "Patient: age unknown, race unknown, ethnicity unknown."
    assert masked[2] == "Image: type unknown, side unknown, view unknown."
    assert masked[3:] == report_text.report(STUDY, WHOLE)[3:]
    assert set(report_text.META) == set(FACTS)


def test_each_fact_is_hidden_with_the_given_probability_independently() -> None:
    rng, draws, p = np.random.default_rng(0), 20000, 0.8
    hidden = np.array(
        [[name in drawn for name in FACTS] for drawn in (report_text.draw_hidden(rng, p) for _ in range(draws))]
    )
    within = 5 * np.sqrt(p * (1 - p) / draws)
    np.testing.assert_allclose(hidden.mean(0), p, atol=within)
    for a, b in combinations(range(len(FACTS)), 2):
        assert abs(np.corrcoef(hidden[:, a], hidden[:, b])[0, 1]) < 5 / np.sqrt(draws), (a, b)
    # All six together are independent too: the numbers of hidden facts are binomial.
    expected = [1, 6, 15, 20, 15, 6, 1] * p ** np.arange(7) * (1 - p) ** np.arange(6, -1, -1)
    np.testing.assert_allclose(np.bincount(hidden.sum(1), minlength=7) / draws, expected, atol=within)
    assert (hidden[1:] != hidden[:-1]).any(1).mean() > 0.8, "drawn afresh each time"


# Styles


def test_a_natural_sentence_says_the_facts_of_the_report() -> None:
    assert report_text.text(STUDY, WHOLE, "sentence") == [
        "This is a screening mammogram of type 2D, side left and view MLO, of a patient of age 61 years, race White "
        "and ethnicity Hispanic or Latino; it shows breast density C, heterogeneously dense, and an irregular mass "
        "with spiculated margin and high density, and fine pleomorphic calcifications in grouped distribution; it is "
        "assessed as BI-RADS 5, highly suggestive of malignancy."
    ]
    stranger = replace(STUDY, age=None, race=None, ethnicity=None, reason=None)
    nobody = "This is a mammogram of type 2D, side right and view CC, of a patient of age unknown, race unknown and "
    for labels, ending in (
        (Labels(), "."),
        (Labels(density="A"), "; it shows breast density A, almost entirely fatty."),
        (Labels(pathology="normal"), "; it shows no mass and no calcification."),
        (Labels(1), "; it shows no mass and no calcification; it is assessed as BI-RADS 1, negative."),
    ):
        text = report_text.text(stranger, view(labels, side="R", position="CC"), "sentence")
        assert text == [f"{nobody}ethnicity unknown{ending}"]


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (Finding(1, "mass"), "a mass"),
        (Finding(1, "mass", shape="oval", density="low"), "an oval mass with low density"),
        (Finding(1, "asymmetry", margin="obscured"), "an asymmetry with obscured margin"),
        (Finding(1, "calcification"), "calcifications"),
        (Finding(1, "calcification", distribution="linear"), "calcifications in linear distribution"),
    ],
)
def test_a_natural_sentence_names_what_is_known_of_a_finding(finding: Finding, words: str) -> None:
    (sentence,) = report_text.text(STUDY, view(Labels(1), findings=(finding,)), "sentence")
    assert f"; it shows {words}; it is assessed" in sentence


def test_a_caption_is_the_labels_and_the_kinds_of_findings() -> None:
    def captioned(labels: Labels, *findings: Finding) -> list[str]:
        return report_text.text(STUDY, view(labels, findings), "caption")

    assert captioned(Labels(5, "C"), MASS, SPECKS, MASS) == [
        "Mammogram, side left, view MLO, density C, mass, calcification, BI-RADS 5."
    ]
    assert captioned(Labels(1, "B")) == ["Mammogram, side left, view MLO, density B, normal, BI-RADS 1."]
    assert captioned(Labels(density="D")) == ["Mammogram, side left, view MLO, density D."]
    assert captioned(Labels(cancer=True)) == ["Mammogram, side left, view MLO."]


@pytest.mark.parametrize("style", ["sentence", "caption"])
def test_every_style_hides_what_is_hidden_and_nothing_else(style: report_text.Style) -> None:
    shown = {"age": "61 years", "race": "White", "ethnicity": "Hispanic or Latino", "type": "2D"}
    shown |= {"side": "left", "view": "MLO"}
    (whole,) = report_text.text(STUDY, WHOLE, style)
    names = tuple(shown) if style == "sentence" else ("side", "view")
    for name in names:
        (masked,) = report_text.text(STUDY, WHOLE, style, frozenset({name}))
        assert masked == whole.replace(f"{name} {shown[name]}", f"{name} unknown") != whole
    (masked,) = report_text.text(STUDY, WHOLE, style, frozenset(report_text.META))
    assert masked.count("unknown") == len(names)
    assert not any(fact in masked for fact in shown.values())


@pytest.mark.parametrize("style", ["report", "sentence", "caption"])
def test_a_radiologists_words_are_a_report_in_every_style(style: report_text.Style) -> None:
    own = view(Labels(4, "A"), (MASS,), "Ödem der Haut.\nMass")
    hidden = frozenset({"age", "side"})
    assert report_text.text(STUDY, own, style, hidden) == report_text.report(STUDY, own, hidden)
    empty = view(Labels(4, "A"), (MASS,), " \n. ")
    assert report_text.text(STUDY, empty, style) == report_text.text(STUDY, replace(empty, report=None), style)


def test_probability_0_hides_nothing_and_1_everything() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        assert report_text.draw_hidden(rng, 0.0) == frozenset()
        assert report_text.draw_hidden(rng, 1.0) == frozenset(FACTS)


def test_the_same_random_numbers_hide_the_same_facts() -> None:
    first, second = (report_text.draw_hidden(np.random.default_rng(7), 0.5) for _ in range(2))
    assert first == second
    assert len({report_text.draw_hidden(np.random.default_rng(seed), 0.5) for seed in range(50)}) > 20


def test_the_texts_that_shipped_figures_were_measured_with_are_as_they_were(cdd_cesm_root: Path) -> None:
    """Of both recipes with figures. Who changes a word here measures them anew."""
    drawn, rng = hashlib.sha256(), np.random.default_rng(0)
    for number in range(300):
        pathology = ("normal", "benign", "malignant")[number % 3]
        labels = Labels(_birads(pathology, rng), "ABCD"[number % 4], pathology == "malignant", pathology)
        shown = view(labels, tuple(lesion.finding for lesion in _lesions(pathology, rng)))
        drawn.update("\n".join(report_text.text(STUDY, shown, "report")).encode())
    assert drawn.hexdigest() == "a6cd1303944243e8c9409465043a51a04890244caead2a81eef0b9bbb52602ab"
    written = hashlib.sha256()
    for study in cdd_cesm(cdd_cesm_root):
        for one in study.views:
            written.update("\n".join(report_text.text(cast(Study, study), cast(View, one), "report")).encode())
    assert written.hexdigest() == "9e92eed8a04eee71b286d2b295bc38934a1d5851c4069719fd6745300baab38a"
