"""Report texts: composed from the facts of a view, anew each time a sample is drawn.

Three styles: the structured report, one natural sentence, a short caption of the labels. The parts and their order
are those of docs/METHOD.md, "Report text": procedure, patient, image, composition, findings, impression, overall
assessment. If the archive has the radiologist's own text, the style is always the report and that text replaces the
findings. A text is a list of sentences: the text tower reads a sentence's embedding at the separator token after it.
"""

from __future__ import annotations

import re

import numpy as np

from mama.settings.schema import Style
from shards.schema import Finding, Study, View

UNKNOWN = "unknown"
FINDINGS = "Findings: "  # begins the sentences of `findings`, and no other
META = ("age", "race", "ethnicity", "type", "side", "view")
HIDDEN = re.compile(rf"\b({'|'.join(META)}) {UNKNOWN}\b")

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
# The finding of an image of which only the assessment is known; category 1 means no finding.
ASSESSED = {
    0: "area that needs more imaging",
    2: "benign finding",
    3: "probably benign finding",
    4: "suspicious abnormality",
    5: "abnormality highly suggestive of malignancy",
    6: "biopsy-proven malignancy",
}
OVERALL = {0: "undecided", 1: "healthy", 2: "benign", 3: "likely benign", 4: "suspect", 5: "malignant", 6: "malignant"}


def text(
    study: Study, view: View, style: Style, hidden: frozenset[str] = frozenset(), tell_pathology: bool = False
) -> list[str]:
    """The report text of one image, as sentences.

    Meta-information named in `hidden` (of `META`) is "unknown". Missing density, BI-RADS or findings are left out,
    never guessed. With `tell_pathology` the text ends in the `outcome` of an image with no other such fact.
    """
    write = report if own_words(view) else STYLES[style]
    return write(study, view, hidden, outcome(view) if tell_pathology else None)


def outcome(view: View) -> str | None:
    """The pathology, if the image has neither an assessment nor findings nor a radiologist's text."""
    if view.labels.birads is not None or view.findings or own_words(view):
        return None
    known = {True: "malignant", False: "not malignant", None: None}[view.labels.cancer]
    return view.labels.pathology or known


def report(study: Study, view: View, hidden: frozenset[str] = frozenset(), ending: str | None = None) -> list[str]:
    """The structured report; arguments as those of `text`, `ending` is the pathology to end with."""
    own = meta(study, view, hidden)
    sentences = [
        f"Procedure: {_procedure(study)}.",
        f"Patient: age {own['age']}, race {own['race']}, ethnicity {own['ethnicity']}.",
        f"Image: type {own['type']}, side {own['side']}, view {own['view']}.",
    ]
    sentences += composition(view) + findings(view) + impression(view)
    return sentences + ([f"Pathology: {ending}."] if ending else [])


def natural_sentence(
    study: Study, view: View, hidden: frozenset[str] = frozenset(), ending: str | None = None
) -> list[str]:
    """The facts of the report in one natural sentence; arguments as those of `report`."""
    own, labels = meta(study, view, hidden), view.labels
    sentence = (
        f"This is a {_procedure(study)} of type {own['type']}, side {own['side']} and view {own['view']}, "
        f"of a patient of age {own['age']}, race {own['race']} and ethnicity {own['ethnicity']}"
    )
    shown = [f"breast density {labels.density}, {COMPOSITION[labels.density]}"] if labels.density else []
    shown += [_noun_phrase(finding) for finding in view.findings]
    if _looks_normal(view):
        shown.append("no mass and no calcification")
    if implied := assessed(view):
        shown.append(_with_article(implied))
    if shown:
        sentence += f"; it shows {', and '.join(shown)}"
    if labels.birads is not None:
        sentence += f"; it is assessed as BI-RADS {labels.birads}, {BIRADS[labels.birads]}"
    if ending:
        sentence += f"; its pathology is {ending}"
    return [f"{sentence}."]


def caption(study: Study, view: View, hidden: frozenset[str] = frozenset(), ending: str | None = None) -> list[str]:
    """Side, view, labels and kinds of findings in one short sentence; arguments as those of `report`."""
    own, labels = meta(study, view, hidden), view.labels
    parts = ["Mammogram", f"side {own['side']}", f"view {own['view']}"]
    if labels.density is not None:
        parts.append(f"density {labels.density}")
    parts += ["normal"] if _looks_normal(view) else dict.fromkeys(finding.kind for finding in view.findings)
    if implied := assessed(view):
        parts.append(implied)
    if labels.birads is not None:
        parts.append(f"BI-RADS {labels.birads}")
    if ending:
        parts.append(f"pathology {ending}")
    return [f"{', '.join(parts)}."]


STYLES = {"report": report, "sentence": natural_sentence, "caption": caption}


def with_meta(sentences: list[str], study: Study, view: View) -> list[str]:
    """A text whose meta-information is hidden -> the same text with that of this image."""
    own = meta(study, view)
    return [HIDDEN.sub(lambda found: f"{found[1]} {own[found[1]]}", sentence) for sentence in sentences]


def meta(study: Study, view: View, hidden: frozenset[str] = frozenset()) -> dict[str, str]:
    """The wording of each piece of meta-information, of `META`."""
    known = {
        "age": f"{study.age} years" if study.age is not None else UNKNOWN,
        "race": study.race or UNKNOWN,
        "ethnicity": study.ethnicity or UNKNOWN,
        "type": "2D",
        "side": SIDES[view.laterality],
        "view": view.view,
    }
    return known | dict.fromkeys(hidden, UNKNOWN)


def _procedure(study: Study) -> str:
    return f"{study.reason} mammogram" if study.reason else "mammogram"


def draw_hidden(rng: np.random.Generator, probability: float) -> frozenset[str]:
    """Meta-information masking: hide each piece of `META` with `probability`, independently."""
    return frozenset(name for name in META if rng.random() < probability)


def composition(view: View) -> list[str]:
    """Sentences on breast density, with a sensitivity warning for C and D; none if the density is unknown."""
    density = view.labels.density
    if density is None:
        return []
    sentences = [f"Composition: density {density}, the breast is {COMPOSITION[density]}."]
    if density in "CD":
        sentences.append("Dense tissue may hide small lesions.")
    return sentences


def findings(view: View) -> list[str]:
    """The radiologist's own sentences, or one for each finding, or one on what the assessment alone implies."""
    if words := own_words(view):
        told = words
    elif view.findings:
        told = [describe(finding) for finding in view.findings]
    elif _looks_normal(view):
        told = ["no mass and no calcification"]
    else:
        told = [implied] if (implied := assessed(view)) else []
    return [f"{FINDINGS}{one}." for one in told]


def tells_finding(sentence: str) -> bool:
    """Whether a sentence of a structured report is one of `findings`."""
    return sentence.startswith(FINDINGS)


def assessed(view: View) -> str | None:
    """The finding that an assessment implies; None if it is described, or if there is no assessment."""
    if own_words(view) or view.findings or _looks_normal(view) or view.labels.birads is None:
        return None
    return ASSESSED[view.labels.birads]


def finding_sentences(view: View, style: Style, sentences: list[str]) -> list[str]:
    """The sentence of the text `sentences` that names each finding, or each of the radiologist's own sentences."""
    return findings(view) if style == "report" or own_words(view) else sentences * len(view.findings)


def own_words(view: View) -> list[str]:
    """The sentences of the radiologist's text, one per line, without full stops."""
    lines = [line.strip().rstrip(".") for line in (view.report or "").splitlines()]
    return [line for line in lines if line]


def _looks_normal(view: View) -> bool:
    return not view.findings and (view.labels.birads == 1 or view.labels.pathology == "normal")


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


def _noun_phrase(finding: Finding) -> str:
    """The descriptors of `describe` as a noun phrase: "an irregular mass with spiculated margin"."""
    if finding.kind == "calcification":
        words = f"{finding.calcification_type or ''} calcifications".strip()
        return f"{words} in {finding.distribution} distribution" if finding.distribution else words
    words = f"{finding.shape or ''} {finding.kind}".strip()
    more = [f"{finding.margin} margin"] if finding.margin else []
    more += [f"{finding.density} density"] if finding.density else []
    return f"{_with_article(words)}{' with ' if more else ''}{' and '.join(more)}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def impression(view: View) -> list[str]:
    """Sentences on the BI-RADS category and its meaning; none if it is unknown."""
    birads = view.labels.birads
    if birads is None:
        return []
    return [f"Impression: BI-RADS {birads}, {BIRADS[birads]}.", f"Overall assessment: {OVERALL[birads]}."]
