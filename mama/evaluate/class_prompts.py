"""Class prompts: the texts that describe each class of a task to the model, one prompt ensemble a class.

A class prompt is written like a training text, with all meta-information hidden, and describes a typical case of its
class. Whatever else a training text states (density, BI-RADS, findings, reason of the exam) varies over the ensemble,
whose embeddings `mama.evaluate.zero_shot` averages: the prompt ensembling of CLIP (Radford et al. 2021, section 3.1.4).
A task with words of its own has these instead, each in every of its templates.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

from mama.data import report_text
from mama.data.wording import Sentences, Wording
from mama.evaluate.tasks import KINDS, UNDESCRIBED, Task, many
from shards.schema import DENSITIES, Finding, Labels, Study, View


@dataclass(frozen=True)
class Case:
    """A typical image of a BI-RADS category: its findings as descriptors, as free text, or none.

    With an `outcome` (see `mama.data.report_text.outcome`) the text states the pathology alone, and `birads` is the
    category that such an image would have had.
    """

    birads: int
    findings: tuple[Finding, ...] = ()
    words: str | None = None
    normal: bool = False  # its pathology is "normal", whatever the category
    outcome: str | None = None


def _mass(shape: str, margin: str, density: str) -> Finding:
    return Finding(1, "mass", shape=shape, margin=margin, density=density)


def _calcification(kind: str, distribution: str) -> Finding:
    return Finding(2, "calcification", calcification_type=kind, distribution=distribution)


# Descriptors and their usual assessment: ACR BI-RADS Atlas, 5th edition, mammography.
DESCRIBED = (
    Case(0, (_mass("irregular", "indistinct", "high"),)),
    Case(0, (_mass("irregular", "spiculated", "high"),)),
    Case(1, normal=True),
    Case(2, normal=True),
    Case(2, (_mass("oval", "circumscribed", "low"),)),
    Case(2, (_mass("round", "circumscribed", "equal"),)),
    Case(2, (_calcification("coarse", "grouped"),)),
    Case(3, (_mass("oval", "circumscribed", "equal"),)),
    Case(3, (_mass("round", "circumscribed", "low"),)),
    Case(3, (_calcification("round", "grouped"),)),
    Case(4, (_mass("irregular", "indistinct", "high"),)),
    Case(4, (_mass("irregular", "spiculated", "high"),)),
    Case(4, (_calcification("fine pleomorphic", "grouped"),)),
    Case(5, (_mass("irregular", "spiculated", "high"),)),
    Case(5, (_mass("irregular", "spiculated", "high"), _calcification("fine pleomorphic", "grouped"))),
    Case(5, (_calcification("fine linear or fine linear branching", "linear"),)),
    Case(6, (_mass("irregular", "spiculated", "high"),)),
)
# Radiologists' words for contrast-enhanced images, spelt as in CDD-CESM: a language model that was tuned on
# "speculated margin" needs "speculated margin" in its prompts.
FREE_TEXT = (
    Case(0, words="Faint enhancement"),
    Case(1, words="No mass or non mass enhancement"),
    Case(2, words="Non enhancement"),
    Case(2, words="Homogenously enhancing mass with circumscribed margin"),
    Case(3, words="Foci of enhancement"),
    Case(3, words="Stippled enhancement"),
    Case(4, words="Heterogenously enhancing mass"),
    Case(4, words="Segmental non mass enhancement"),
    Case(5, words="Heterogenously enhancing mass with speculated margin"),
    Case(5, words="Heterogenously enhancing irregular mass with speculated margin"),
    Case(5, words="Multiple heterogenously enhancing masses with irregular margin"),
    Case(6, words="Heterogenously enhancing mass with irregular margin"),
)
ASSESSED = tuple(Case(birads) for birads in range(7))
OUTCOMES = (
    Case(1, outcome="normal"),
    Case(2, outcome="benign"),
    Case(2, outcome="not malignant"),
    Case(5, outcome="malignant"),
)
# Kinds of findings that are described for the tasks about findings alone.
RARER = (
    Case(0, (Finding(3, "asymmetry", shape="focal"),)),
    Case(4, (Finding(3, "asymmetry", shape="developing"),)),
    Case(4, (Finding(4, "distortion"),)),
    Case(5, (Finding(4, "distortion"),)),
)
# BI-RADS categories of the typical images of each value of a label.
TYPICAL: dict[str, dict[Any, tuple[int, ...]]] = {
    "cancer": {False: (1, 2), True: (4, 5)},
    "pathology": {"normal": (1,), "benign": (2, 3), "malignant": (4, 5)},
}
CLEAR = (1, 2, 4, 5)  # the categories of the typical images of each density
SENTENCE_END = re.compile(r"(?<=[.])\s+")


def prompt_ensembles(task: Task, wording: Wording) -> list[list[Sentences]]:
    """The class prompts of each class, each a list of sentences as `mama.data.report_text.text` writes them.

    Density and BI-RADS are left out if the data set's texts have none, unless the task is about them.
    """
    return [[list(text) for text in texts] for texts in _prompts(task, wording)]


def prompts_digest(ensembles: list[list[Sentences]]) -> str:
    """SHA-256 of the class prompts of some classes: scores by other prompts are other scores."""
    return hashlib.sha256(json.dumps(ensembles).encode()).hexdigest()


def prompt_templates(task: Task, wording: Wording) -> list[list[str]]:
    """What each of the class prompts of `prompt_ensembles` is made after: one of the task's own templates, or what a
    training text states besides the class, such as "density B".
    """
    return [list(texts.values()) for texts in _prompts(task, wording)]


def _prompts(task: Task, wording: Wording) -> list[dict[tuple[str, ...], str]]:
    """Of each class: text -> template. A dict keeps the order and drops equal texts."""
    if task.words:
        return [_own_words(task, many(task.words[name])) for name in task.names]
    return [_ensemble(task, k, wording) for k in range(len(task.names))]


def _own_words(task: Task, words: list[str]) -> dict[tuple[str, ...], str]:
    filled = ((template, template.replace("{}", word)) for template in task.templates or ["{}"] for word in words)
    return {tuple(SENTENCE_END.split(text.strip())): template for template, text in filled}


def _ensemble(task: Task, k: int, wording: Wording) -> dict[tuple[str, ...], str]:
    """In the data set's words, or in BI-RADS descriptors if the data set has no words for this class."""
    with_density = wording.density or task.label == "density"
    with_birads = wording.birads or task.label == "birads"
    hidden, tell_pathology = frozenset(report_text.META), bool(wording.outcomes)
    rarer = RARER if task.label in KINDS else ()
    texts: dict[tuple[str, ...], str] = {}
    for cases in (_cases(wording), DESCRIBED):
        for case, density, reason in product(cases + rarer, DENSITIES, wording.reasons):
            if _class_of(task, case, density) == k:
                view = _view(case, density if with_density else None, with_birads)
                study = Study(key="", patient="", source="", split="", views=(view,), reason=reason)
                text = tuple(report_text.text(study, view, wording.style, hidden, tell_pathology))
                texts.setdefault(text, _besides(task, view, reason if len(wording.reasons) > 1 else None))
        if texts:
            break
    return texts


def _class_of(task: Task, case: Case, density: str) -> int | None:
    """The class of which `case`, with this breast density, is a typical image."""
    if task.label == "density":
        return task.class_of(density) if case.birads in CLEAR else None
    if task.label in TYPICAL:
        typical = (value for value, categories in TYPICAL[task.label].items() if case.birads in categories)
        return task.class_of(next(typical, None))
    if case.outcome:
        return None
    if task.label == "birads":
        return task.class_of(case.birads)
    if case.words or (case.birads in UNDESCRIBED and not case.findings):
        return None
    return task.class_of(any(finding.kind == task.label for finding in case.findings))


def _besides(task: Task, view: View, reason: str | None) -> str:
    """What a class prompt states that its class does not decide."""
    labels = view.labels
    parts = [f"density {labels.density}"] if labels.density and task.label != "density" else []
    parts += [f"BI-RADS {labels.birads}"] if labels.birads is not None and task.label == "density" else []
    return ", ".join(parts + ([f"{reason} mammogram"] if reason else [])) or "class prompts"


def _cases(wording: Wording) -> tuple[Case, ...]:
    """The cases that the data set's words can describe."""
    cases: tuple[Case, ...] = FREE_TEXT if wording.reports else DESCRIBED if wording.descriptors else ()
    cases += ASSESSED if wording.assessed else ()
    return cases + tuple(case for case in OUTCOMES if case.outcome in wording.outcomes)


def _view(case: Case, density: str | None, with_birads: bool) -> View:
    """A view with the facts of `case` alone; the caller hides its side and view."""
    outcome = "normal" if case.normal else case.outcome
    labels = Labels(
        birads=case.birads if with_birads and not case.outcome else None,
        density=density,
        cancer=False if outcome == "not malignant" else None,
        pathology=None if outcome == "not malignant" else outcome,
    )
    return view_with(labels, case.findings, case.words)


def described(kind: str) -> list[Finding]:
    """The findings of a kind in the typical cases, in descriptors; none for a kind that no case has."""
    found = (finding for case in DESCRIBED + RARER for finding in case.findings if finding.kind == kind)
    return list(dict.fromkeys(found))


def view_with(labels: Labels, findings: tuple[Finding, ...], report: str | None = None) -> View:
    """A view of no image, for a text about these facts alone; whoever writes the text hides its side and view."""
    return View(
        member="",
        laterality="L",
        view="CC",
        size=(1, 1),
        original_size=(1, 1),
        pixel_spacing=None,
        crop=(0, 0, 1, 1),
        flipped=False,
        to_original=(1, 0, 0, 0, 1, 0),
        labels=labels,
        findings=findings,
        report=report,
    )
