"""Controls of pointing: what a map shows if its sentence does not name the finding, in the same image.

A map that finds lesions whatever it is asked for shows that a patch stands out, not that the model has read. So each
described finding is also looked for by two other sentences in the place of its own, all else in the text the same, and
by the difference of its own map to one of them. Only where it is the one finding of its image: a mass with
calcifications in it would be looked for by a sentence that is true, in a text that names it elsewhere.

Letters: t targets, c controls, gh x gw patches of an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mama.data import report_text
from mama.data.images import BACKGROUND
from mama.evaluate.arrays import Float32s
from mama.evaluate.pointing import Pointed, Target, difference, estimate
from mama.settings.schema import Config, Style

OTHER_FINDING, NO_FINDING, CONTRAST = "other finding", "no finding", "against no finding"
NO_FINDINGS = f"{report_text.FINDINGS}no mass and no calcification."

Fits = Callable[[list[str], int], bool]  # whether a sentence of a text is among those that the model reads


@dataclass(frozen=True)
class Control:
    """The text of target number `target` with another sentence in the place of its own."""

    target: int
    name: str  # OTHER_FINDING or NO_FINDING
    text: tuple[str, ...]
    sentence: int


@dataclass(frozen=True)
class Controls:
    """Those of all targets, in the order of these; `missing` are the reasons for names of which there is none."""

    made: list[Control] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def find(targets: list[Target], style: Style, fits: Fits) -> Controls:
    """The controls of targets with a box whose finding is described, and the only one of its image.

    Other text does not say in which words it names a finding.

    The other finding is the sentence that names a finding of another kind in most targets, of several the first in the
    alphabet.
    """
    if style != "report":
        return _none(f"data.style={style}: no sentence of such a text is about the finding alone")
    described = {n: kinds for n, target in enumerate(targets) if target.lesions and (kinds := _kinds(target))}
    if not described:
        return _none(
            "no finding of this split with a box is described and the only one of its image: radiologists' own words "
            "are not replaced"
        )
    counts = Counter((targets[n].text[targets[n].sentence], kinds) for n, kinds in described.items())
    frequent = sorted(counts, key=lambda one: (-counts[one], one[0]))
    made = []
    for n, kinds in described.items():
        others = [sentence for sentence, of_kinds in frequent if not kinds & of_kinds]
        for name, words in ((OTHER_FINDING, others[:1]), (NO_FINDING, [NO_FINDINGS])):
            number = targets[n].sentence
            text = [*targets[n].text[:number], *words, *targets[n].text[number + 1 :]]
            if words and fits(text, number):
                made.append(Control(n, name, tuple(text), number))
    names = {control.name for control in made}
    one_kind = all(kinds & of_kinds for kinds in described.values() for _, of_kinds in frequent)
    missing = {OTHER_FINDING: "all described findings of this split are of one kind"} if one_kind else {}
    too_long = {name: "the text is too long with it" for name in (OTHER_FINDING, NO_FINDING) if name not in names}
    if NO_FINDING not in names:
        too_long[CONTRAST] = too_long[NO_FINDING]
    return Controls(made, too_long | missing)


def _none(reason: str) -> Controls:
    return Controls([], dict.fromkeys((OTHER_FINDING, NO_FINDING, CONTRAST), reason))


def _kinds(target: Target) -> frozenset[str]:
    """The kinds of the findings that the target's sentence describes.

    None if it is of a radiologist's own text, or another sentence describes a finding too.
    """
    view, sentence = target.item.view, target.text[target.sentence]
    if report_text.own_words(view):
        return frozenset()
    if set(report_text.findings(view)) != {sentence}:
        return frozenset()
    return frozenset(finding.kind for finding in view.findings)


def document(
    own: Float32s,
    of_controls: Float32s,
    controls: Controls,
    grey: Float32s,
    targets: list[Target],
    size: tuple[int, int],
    config: Config,
) -> dict[str, Any]:
    """The figures of pointing by the maps `of_controls` [c, gh, gw], of the targets with a box.

    `own` [t, gh, gw] are the maps of the targets' own sentences, `grey` [t, gh, gw] the mean grey values. `difference`
    is the figure of the own sentence minus that of the control, in the same targets: above 0 where a map depends on
    its sentence. `against no finding` is the map of the own sentence minus that of no finding.
    """
    maps: dict[str, dict[int, Float32s]] = {}
    for control, values in zip(controls.made, of_controls, strict=True):
        if targets[control.target].lesions:
            maps.setdefault(control.name, {})[control.target] = values
    if NO_FINDING in maps:
        maps[CONTRAST] = {n: own[n] - values for n, values in maps[NO_FINDING].items()}
    boxed = [n for n, target in enumerate(targets) if target.lesions]
    place = {n: number for number, n in enumerate(boxed)}
    theirs = Pointed(own[boxed], grey[boxed] > BACKGROUND, [targets[n] for n in boxed], size).figures() if maps else {}
    rows = []
    for name, of_targets in maps.items():
        among = list(of_targets)
        stacked = np.stack(list(of_targets.values()))
        found = Pointed(stacked, grey[among] > BACKGROUND, [targets[n] for n in among], size).figures()
        ours = {key: values[[place[n] for n in among]] for key, values in theirs.items()}
        patients = [targets[n].item.study.patient for n in among]
        row = {"name": name, "findings": len(among), "patients": len(set(patients))}
        row |= {key: estimate(values, patients, config) for key, values in found.items()}
        rows.append(row | {"difference": difference(ours, found, patients, config)})
    missing = [{"name": name, "reason": reason} for name, reason in controls.missing.items()]
    return {"rows": rows, "missing": missing, "sentences": _sentences(controls)}


def _sentences(controls: Controls) -> list[str]:
    """The sentences that stand for another finding."""
    used = (control.text[control.sentence] for control in controls.made if control.name == OTHER_FINDING)
    return sorted(set(used))
