"""Controls of pointing: which sentences stand in for a finding's own, and figures that are paired with its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mama.data import report_text
from mama.data.held_out import Item
from mama.evaluate import bootstrap, controls
from mama.evaluate.boxes import Lesion
from mama.evaluate.controls import CONTRAST, NO_FINDING, NO_FINDINGS, OTHER_FINDING, Control, Controls
from mama.evaluate.pointing import Target
from mama.settings.schema import Config, EvalConfig
from shards.schema import Box, Finding
from tests.support.cohort import study

MASS, ROUND = Finding(1, "mass", (0.0, 0.0, 8.0, 8.0), "irregular"), Finding(1, "mass", (0.0, 0.0, 8.0, 8.0), "round")
FINE = Finding(2, "calcification", (24.0, 24.0, 32.0, 32.0), calcification_type="fine")
COARSE = Finding(2, "calcification", (24.0, 24.0, 32.0, 32.0), calcification_type="coarse")


def target(number: int, *findings: Finding, named: int = 0, words: str | None = None) -> Target:
    """Of a patient of that number, whose image shows these findings; the sentence is that of finding `named`."""
    one = study(number, "test")
    view = replace(one.views[0], findings=findings, report=words)
    text = report_text.report(one, view)
    sentence = text.index(report_text.findings(view)[named])
    box = findings[named].box if findings else None
    found = (Lesion(box, findings[named].kind, 7, None),) if box else ()
    return Target(number, Item(number, 0, replace(one, views=(view,))), text, sentence, found)


def test_another_sentence_stands_in_the_place_of_the_own_one() -> None:
    targets = [target(0, FINE), target(1, ROUND), target(2, MASS), target(3, COARSE), target(4, FINE), target(5, MASS),
               target(6, words="A mass of 5 mm")]  # fmt: skip
    found = controls.find(targets, "report", lambda text, number: True)
    assert [(one.target, one.name) for one in found.made] == [
        (n, name) for n in range(6) for name in (OTHER_FINDING, NO_FINDING)
    ]
    fine, mass = "Findings: fine calcifications.", "Findings: irregular mass."
    others = {one.target: one.text[one.sentence] for one in found.made if one.name == OTHER_FINDING}
    assert others == {0: mass, 1: fine, 2: fine, 3: mass, 4: mass, 5: fine}
    for one in found.made:
        own = targets[one.target]
        assert one.sentence == own.sentence
        differing = [n for n, (ours, theirs) in enumerate(zip(one.text, own.text, strict=True)) if ours != theirs]
        assert differing == [own.sentence]
        assert one.name == OTHER_FINDING or one.text[one.sentence] == NO_FINDINGS
    assert found.missing == {}
    assert NO_FINDINGS in report_text.findings(replace(study(0, "test").views[1], findings=()))  # the words of reports


def test_a_finding_beside_another_one_has_no_control() -> None:
    """Both are in the image, and the text still names the one that is not replaced."""
    both = [target(0, MASS, FINE), target(0, MASS, FINE, named=1), target(1, MASS), target(2, COARSE)]
    found = controls.find(both, "report", lambda text, number: True)
    assert {one.target for one in found.made} == {2, 3}
    alike = replace(MASS, number=3, box=(40.0, 40.0, 48.0, 48.0))  # in the same words: one sentence for both
    assert {one.target for one in controls.find([target(0, MASS, alike)], "report", lambda *_: True).made} == {0}


def test_why_there_is_no_control() -> None:
    masses = [target(0, MASS), target(1, ROUND)]
    one_kind = controls.find(masses, "report", lambda text, number: True)
    assert {one.name for one in one_kind.made} == {NO_FINDING}
    assert one_kind.missing == {OTHER_FINDING: "all described findings of this split are of one kind"}
    everything = {OTHER_FINDING, NO_FINDING, CONTRAST}
    for found, why in (
        (controls.find(masses, "caption", lambda text, number: True), "data.style=caption: no sentence"),
        (controls.find([target(0, words="A mass")], "report", lambda text, number: True), "radiologists' own words"),
        (controls.find([*masses, target(2, FINE)], "report", lambda text, number: False), "the text is too long"),
    ):
        assert found.made == []
        assert found.missing.keys() == everything
        assert all(why in reason for reason in found.missing.values())


def test_figures_are_paired_with_those_of_the_own_sentence() -> None:
    """Own: 3 of 4 hit. Asked for no finding the maps of targets 0 and 2 point elsewhere; target 3 has no control."""
    targets = [target(n, MASS) for n in range(4)] + [target(4, replace(MASS, box=None))]
    own = np.random.default_rng(0).uniform(0, 0.5, (5, 4, 4)).astype(np.float32)
    own[:3, 0, 0], own[3, 3, 3] = 0.9, 0.9
    of_none = own.copy()
    of_none[[0, 2], 0, 0], of_none[[0, 2], 3, 3] = 0.0, 1.0
    made = [Control(n, NO_FINDING, ("x",), 0) for n in (0, 1, 2, 4)]
    grey = np.full((5, 4, 4), 100, np.float32)
    found = controls.document(
        own, of_none[[0, 1, 2, 4]], Controls(made, {OTHER_FINDING: "why"}), grey, targets, (32, 32),
        Config(eval=EvalConfig(bootstrap=200)),
    )  # fmt: skip
    plain, contrast = found["rows"]
    assert found["missing"] == [{"name": OTHER_FINDING, "reason": "why"}]
    assert (plain["name"], plain["findings"], plain["patients"]) == (NO_FINDING, 3, 3)
    for key in ("hit_rate", "strict_hit_rate"):
        assert plain[key]["value"] == pytest.approx(1 / 3)
        assert plain["difference"][key]["value"] == pytest.approx(2 / 3)
        assert plain["difference"][key]["low"] < 2 / 3 <= plain["difference"][key]["high"]
    assert 0 < plain["difference"]["box_auc"]["value"] < 1
    # own - no finding: highest at the box of 0 and 2, and the same everywhere (the first patch, which is there) in 1.
    assert (contrast["name"], contrast["hit_rate"]["value"]) == (CONTRAST, 1.0)
    assert contrast["difference"]["hit_rate"]["value"] == 0


def test_a_paired_difference_has_the_interval_of_the_differences() -> None:
    """Against that of the mean over patients of the differences themselves, which is normal with many of them."""
    random = np.random.default_rng(3)
    common = random.random(1200)
    ours, theirs = ((common < share).astype(float) for share in (0.62, 0.55))  # 0.07 apart, and found by both before
    patients = [str(n // 3) for n in range(1200)]
    found = bootstrap.mean_difference(ours, theirs, patients, 2000, 0)
    each = (ours - theirs).reshape(400, 3).mean(1)
    half = 1.96 * each.std(ddof=1) / 20
    assert found.value == pytest.approx(each.mean())
    assert (found.low, found.high) == pytest.approx((each.mean() - half, each.mean() + half), abs=0.003)
    unpaired = bootstrap.mean_difference(ours, np.roll(theirs, 600), patients, 2000, 0)
    assert unpaired.low is not None
    assert unpaired.high is not None
    assert unpaired.high - unpaired.low > 4 * half, "the pairs are what makes it short"
    same = bootstrap.mean_difference(ours, ours, patients, 200, 0)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-3)
    alone = bootstrap.mean_difference(np.ones(2), np.zeros(2), ["a", "a"], 200, 0)
    assert (alone.value, alone.low, alone.reason) == (1, None, "no interval: they are of one patient")
    assert bootstrap.mean_difference(np.zeros(0), np.zeros(0), [], 200, 0).value is None


def test_a_box_may_be_none() -> None:
    """The targets without a box have maps, and no figures."""
    box: Box | None = replace(MASS, box=None).box
    assert box is None
    alone = [target(0, replace(MASS, box=None))]
    nothing = np.zeros((1, 4, 4), np.float32)
    made = Controls([Control(0, NO_FINDING, ("x",), 0)])
    found = controls.document(nothing, nothing, made, nothing + 100, alone, (32, 32), Config())
    assert found["rows"] == []
