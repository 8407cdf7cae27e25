"""How the report texts of a data set are worded, and which statements they make.

Class prompts are written in the same wording (`mama.evaluate.class_prompts`), and only words that the training texts
use can be expected to work (`mama.evaluate.training_vocabulary`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import chain

from mama.data import report_text, seen_findings
from mama.settings.schema import DataConfig, Style
from shards.schema import Study, View

Sentences = list[str]

SEPARATORS = re.compile(r"[;:,.]| and | with | in ")  # between the statements of a sentence
HIDDEN = frozenset(report_text.META)


@dataclass(frozen=True)
class Wording:
    """Style and contents of a data set's report texts. Its class prompts state the same kinds of facts, no others."""

    reasons: tuple[str | None, ...] = (None,)
    density: bool = True
    birads: bool = True
    reports: bool = False  # findings are quoted from radiologists' reports
    descriptors: bool = True  # findings have BI-RADS descriptors
    assessed: bool = False  # of some findings only the BI-RADS assessment is known
    outcomes: tuple[str, ...] = ()  # pathologies in the texts, see `data.tell_pathology`
    style: Style = "report"

    def __or__(self, other: Wording) -> Wording:
        """That of both data sets together; the style is that of the first."""
        return Wording(
            reasons=tuple(sorted({*self.reasons, *other.reasons}, key=str)),
            density=self.density or other.density,
            birads=self.birads or other.birads,
            reports=self.reports or other.reports,
            descriptors=self.descriptors or other.descriptors,
            assessed=self.assessed or other.assessed,
            outcomes=tuple(sorted({*self.outcomes, *other.outcomes})),
            style=self.style,
        )


def wording_of(studies: Iterable[Study], style: Style = "report", tell_pathology: bool = False) -> Wording:
    """The wording of these studies' texts; `style` and `tell_pathology` as in `mama.data.report_text.text`."""
    none = Wording((), density=False, birads=False, descriptors=False, style=style)
    return reduce(Wording.__or__, (_wording_of_one(study, tell_pathology) for study in studies), none)


def _wording_of_one(study: Study, tell_pathology: bool) -> Wording:
    views = study.views
    outcomes = {outcome for view in views if (outcome := report_text.outcome(view))} if tell_pathology else ()
    return Wording(
        reasons=(study.reason,),
        density=any(view.labels.density for view in views),
        birads=any(view.labels.birads is not None for view in views),
        reports=any(report_text.own_words(view) for view in views),
        descriptors=any(view.findings for view in views),
        assessed=any(report_text.assessed(view) for view in views),
        outcomes=tuple(outcomes),
    )


def statements(text: Sentences) -> set[str]:
    """The smallest statements of a text: "BI-RADS 4", "suspicious", "spiculated margin"."""
    return {part.strip() for sentence in text for part in SEPARATORS.split(sentence)} - {""}


def training_statements(studies: Iterable[Study], config: DataConfig) -> set[str]:
    """All statements of these studies' texts, written with the settings of `config` and no meta-information."""
    views = ((study, view) for study in studies for view in study.views)
    return set(chain.from_iterable(statements_of(study, view, config) for study, view in views))


def statements_of(study: Study, view: View, config: DataConfig) -> set[str]:
    """Those of the text of one image; with `data.findings=crop` also where no finding that has a box is seen."""
    told = {(True,) * len(view.findings)}
    if config.findings == "crop":
        told.add(tuple(finding.box is None for finding in view.findings))
    return {one for seen in told for one in statements(seen_findings.text(study, view, seen, config, HIDDEN))}
