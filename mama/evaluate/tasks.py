"""What is asked of held-out images: classes, the label of an image, and the words for each class.

A class is described to the model by texts in the template of training, with all meta-information
hidden. Each text tells a typical case of the class; everything that a training text says beside the
class (density, BI-RADS, findings, reason) is varied, and `mama.evaluate.zero_shot` averages over the texts, the
prompt ensemble of CLIP (Radford et al. 2021, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

from mama.data import report_text
from mama.settings.schema import Style
from shards.schema import DENSITIES, Finding, Labels, Study, View

Sentences = list[str]


@dataclass(frozen=True)
class Wording:
    """The style of a data set's texts and what they say beside the findings; prompts say the same and no more."""

    reasons: tuple[str | None, ...] = (None,)
    density: bool = True
    birads: bool = True
    reports: bool = False  # the findings are a radiologist's own words
    descriptors: bool = True  # the findings are described
    assessed: bool = False  # some findings are known by their assessment alone
    outcomes: tuple[str, ...] = ()  # the pathologies that are told, see `data.tell_pathology`
    style: Style = "report"


def wording_of(studies: Iterable[Study], style: Style = "report", tell_pathology: bool = False) -> Wording:
    """The wording of these studies' texts, for arguments as those of `mama.data.report_text.text`."""
    studies = list(studies)
    views = [view for study in studies for view in study.views]
    outcomes = {outcome for view in views if (outcome := report_text.outcome(view))} if tell_pathology else ()
    return Wording(
        reasons=tuple(sorted({study.reason for study in studies}, key=str)),
        density=any(view.labels.density for view in views),
        birads=any(view.labels.birads is not None for view in views),
        reports=any(report_text.own_words(view) for view in views),
        descriptors=any(view.findings for view in views),
        assessed=any(report_text.assessed(view) for view in views),
        outcomes=tuple(sorted(outcomes)),
        style=style,
    )


@dataclass(frozen=True)
class Case:
    """A typical image of a BI-RADS category: findings in the lexicon's descriptors, or in free words, or none.

    With an `outcome` (see `mama.data.report_text.outcome`) the pathology is all that is known, and `birads` is
    the category that such an image would have had.
    """

    birads: int
    findings: tuple[Finding, ...] = ()
    words: str | None = None
    normal: bool = False  # called so, whatever the category
    outcome: str | None = None


def _mass(shape: str, margin: str, density: str) -> Finding:
    return Finding(1, "mass", shape=shape, margin=margin, density=density)


def _specks(kind: str, distribution: str) -> Finding:
    return Finding(2, "calcification", calcification_type=kind, distribution=distribution)


# Descriptors and their usual assessment: ACR BI-RADS Atlas, 5th edition, mammography.
DESCRIBED = (
    Case(0, (_mass("irregular", "indistinct", "high"),)),
    Case(0, (_mass("irregular", "spiculated", "high"),)),
    Case(1, normal=True),
    Case(2, normal=True),
    Case(2, (_mass("oval", "circumscribed", "low"),)),
    Case(2, (_mass("round", "circumscribed", "equal"),)),
    Case(2, (_specks("coarse", "grouped"),)),
    Case(3, (_mass("oval", "circumscribed", "equal"),)),
    Case(3, (_mass("round", "circumscribed", "low"),)),
    Case(3, (_specks("round", "grouped"),)),
    Case(4, (_mass("irregular", "indistinct", "high"),)),
    Case(4, (_mass("irregular", "spiculated", "high"),)),
    Case(4, (_specks("fine pleomorphic", "grouped"),)),
    Case(5, (_mass("irregular", "spiculated", "high"),)),
    Case(5, (_mass("irregular", "spiculated", "high"), _specks("fine pleomorphic", "grouped"))),
    Case(5, (_specks("fine linear or fine linear branching", "linear"),)),
    Case(6, (_mass("irregular", "spiculated", "high"),)),
)
# The words that radiologists use of contrast-enhanced images, spelt as CDD-CESM spells them: a
# language model that was tuned on "speculated margin" has to be asked about "speculated margin".
WRITTEN = (
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


@dataclass(frozen=True)
class Task:
    """A question with one answer per image.

    `label` gives the class's number, or None where the archive does not say or the image is not
    asked about. Of two classes the second is the positive one. `describes` says whether a case,
    told with a density, is one of class `k`.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    label: Callable[[View], int | None]
    describes: Callable[[Case, str, int], bool]

    @property
    def binary(self) -> bool:
        return len(self.classes) == 2


def _cancer(view: View) -> int | None:
    return None if view.labels.cancer is None else int(view.labels.cancer)


def _malignancy(view: View) -> int | None:
    return {"normal": 0, "malignant": 1}.get(view.labels.pathology or "")


def _birads(view: View) -> int | None:
    return view.labels.birads


def _density(view: View) -> int | None:
    return None if view.labels.density is None else DENSITIES.index(view.labels.density)


TASKS = {
    task.name: task
    for task in (
        Task(
            "cancer",
            "Cancer in the breast",
            ("no cancer", "cancer"),
            _cancer,
            lambda case, density, k: case.birads in ((1, 2), (4, 5))[k],
        ),
        Task(
            "malignancy",
            "Malignant against normal (benign left out)",
            ("normal", "malignant"),
            _malignancy,
            lambda case, density, k: case.birads in ((1,), (4, 5))[k],
        ),
        Task(
            "birads",
            "BI-RADS category",
            tuple(f"BI-RADS {n}" for n in range(7)),
            _birads,
            lambda case, density, k: case.birads == k and not case.outcome,
        ),
        Task(
            "density",
            "Breast density",
            DENSITIES,
            _density,
            lambda case, density, k: DENSITIES.index(density) == k and case.birads in (1, 2, 4, 5),
        ),
    )
}


def prompts(task: Task, wording: Wording) -> list[list[Sentences]]:
    """For each class its texts, each a list of sentences as `mama.data.report_text.text` writes them.

    A text leaves out density or BI-RADS where the data set's texts have none, unless the task is
    about it.
    """
    return [_texts_of_class(task, k, wording) for k in range(len(task.classes))]


def _texts_of_class(task: Task, k: int, wording: Wording) -> list[Sentences]:
    """In the words that the data set has; of a class that it has no words for, in those of the lexicon."""
    with_density = wording.density or task.name == "density"
    with_birads = wording.birads or task.name == "birads"
    hidden, tell_pathology = frozenset(report_text.META), bool(wording.outcomes)
    texts: dict[tuple[str, ...], None] = {}  # a dict keeps the order and drops equal texts
    for cases in (_cases(wording), DESCRIBED):
        for case, density, reason in product(cases, DENSITIES, wording.reasons):
            if task.describes(case, density, k):
                view = _view(case, density if with_density else None, with_birads)
                study = Study(key="", patient="", source="", split="", views=(view,), reason=reason)
                texts[tuple(report_text.text(study, view, wording.style, hidden, tell_pathology))] = None
        if texts:
            break
    return [list(text) for text in texts]


def _cases(wording: Wording) -> tuple[Case, ...]:
    """The cases that can be told in the data set's words."""
    cases: tuple[Case, ...] = WRITTEN if wording.reports else DESCRIBED if wording.descriptors else ()
    cases += ASSESSED if wording.assessed else ()
    return cases + tuple(case for case in OUTCOMES if case.outcome in wording.outcomes)


def _view(case: Case, density: str | None, with_birads: bool) -> View:
    """A view of which only the facts of `case` are known; side and view are hidden by the caller."""
    outcome = "normal" if case.normal else case.outcome
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
        labels=Labels(
            birads=case.birads if with_birads and not case.outcome else None,
            density=density,
            cancer=False if outcome == "not malignant" else None,
            pathology=None if outcome == "not malignant" else outcome,
        ),
        findings=case.findings,
        report=case.words,
    )
