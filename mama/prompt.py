"""The words: a report written from a view's facts, afresh each time a sample is drawn.

The order of the parts is METHOD's (procedure, patient, image, composition, findings, impression,
overall assessment); a radiologist's own words, where the archive has them, stand as they are in
the place of the findings. Each string is one sentence: the towers read a sentence's embedding at
the separator token behind it.
"""

from __future__ import annotations

import numpy as np

from shards.schema import Finding, Study, View

UNKNOWN = "unknown"
META = ("age", "race", "ethnicity", "type", "side", "view")

SIDES = {"L": "left", "R": "right"}
COMPOSITION = {  # ACR BI-RADS Atlas, 5th edition, breast composition categories
    "A": "almost entirely fatty",
    "B": "scattered fibroglandular tissue",
    "C": "heterogeneously dense",
    "D": "extremely dense",
}
BIRADS = {  # ACR BI-RADS Atlas, 5th edition, assessment categories
    0: "incomplete, more imaging is needed",
    1: "negative",
    2: "benign",
    3: "probably benign",
    4: "suspicious",
    5: "highly suggestive of malignancy",
    6: "biopsy-proven malignancy",
}
OVERALL = {0: "undecided", 1: "healthy", 2: "benign", 3: "likely benign", 4: "suspect", 5: "malignant", 6: "malignant"}


def report(study: Study, view: View, hidden: frozenset[str] = frozenset()) -> list[str]:
    """The sentences that describe one image; the meta-information named in `hidden` reads "unknown".

    What the archive does not say of density, BI-RADS or findings is left out, never guessed.
    """
    meta = {
        "age": f"{study.age} years" if study.age is not None else UNKNOWN,
        "race": study.race or UNKNOWN,
        "ethnicity": study.ethnicity or UNKNOWN,
        "type": "2D",
        "side": SIDES[view.laterality],
        "view": view.view,
    }
    meta.update(dict.fromkeys(hidden, UNKNOWN))
    sentences = [
        f"Procedure: {study.reason + ' ' if study.reason else ''}mammogram.",
        f"Patient: age {meta['age']}, race {meta['race']}, ethnicity {meta['ethnicity']}.",
        f"Image: type {meta['type']}, side {meta['side']}, view {meta['view']}.",
    ]
    return sentences + composition(view) + findings(view) + impression(view)


def draw_hidden(rng: np.random.Generator, probability: float) -> frozenset[str]:
    """Meta-information masking: each piece is hidden with `probability`, independently."""
    return frozenset(name for name in META if rng.random() < probability)


def composition(view: View) -> list[str]:
    density = view.labels.density
    if density is None:
        return []
    sentences = [f"Composition: density {density}, the breast is {COMPOSITION[density]}."]
    if density in "CD":
        sentences.append("Dense tissue may hide small lesions.")
    return sentences


def findings(view: View) -> list[str]:
    """One sentence a finding, or the radiologist's own sentences."""
    lines = [line.strip().rstrip(".") for line in (view.report or "").splitlines()]
    if any(lines):
        return [f"Findings: {line}." for line in lines if line]
    if view.findings:
        return [f"Findings: {describe(finding)}." for finding in view.findings]
    if view.labels.birads == 1 or view.labels.pathology == "normal":
        return ["Findings: no mass and no calcification."]
    return []


def describe(finding: Finding) -> str:
    """A finding in BI-RADS descriptors, for example "irregular mass, spiculated margin, high density"."""
    if finding.kind == "calcification":
        words = f"{finding.calcification_type or ''} calcifications".strip()
        return f"{words}, {finding.distribution} distribution" if finding.distribution else words
    words = f"{finding.shape or ''} {finding.kind}".strip()
    if finding.margin:
        words += f", {finding.margin} margin"
    if finding.density:
        words += f", {finding.density} density"
    return words


def impression(view: View) -> list[str]:
    birads = view.labels.birads
    if birads is None:
        return []
    return [f"Impression: BI-RADS {birads}, {BIRADS[birads]}.", f"Overall assessment: {OVERALL[birads]}."]
