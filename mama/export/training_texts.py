"""How the training texts of a model are worded, and what they state: `texts.json` of a model folder.

Class prompts for the model are written in this wording, and a class that no training text mentions was not taught. Of
a radiologist's own words only those stay that the texts of several patients have: a phrase of the craft, and nothing
that could be a fact of one person.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from mama.data import report_text
from mama.data.wording import Wording, statements, statements_of, wording_of
from mama.export.preprocessing import read_facts
from mama.run.files import write_json
from mama.settings.schema import DataConfig
from shards.schema import Study, View

TEXTS = "texts.json"
FEWEST_PATIENTS = 5  # whose texts make a statement in a radiologist's own words


@dataclass(frozen=True)
class TrainingTexts:
    """The wording of the training texts, their sorted statements, and whether they state the pathology."""

    wording: Wording
    statements: tuple[str, ...]
    tell_pathology: bool


class TextsOf:
    """The facts of `TrainingTexts`, gathered study by study."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.wording = wording_of([], config.style, config.tell_pathology)
        self.composed: set[str] = set()  # statements in the words of `mama.data.report_text`
        self.quoted: dict[str, set[str]] = {}  # in a radiologist's own words -> its first patients

    def add(self, study: Study) -> None:
        """Add the texts of all images of a study."""
        self.wording |= wording_of([study], self.config.style, self.config.tell_pathology)
        for view in study.views:
            own = _own_words(view)
            self.composed |= statements_of(study, view, self.config) - own
            for statement in own:
                patients = self.quoted.setdefault(statement, set())
                if len(patients) < FEWEST_PATIENTS:
                    patients.add(study.patient)

    def found(self) -> TrainingTexts:
        """All facts of the studies that were added."""
        often = {statement for statement, patients in self.quoted.items() if len(patients) >= FEWEST_PATIENTS}
        return TrainingTexts(self.wording, tuple(sorted(self.composed | often)), self.config.tell_pathology)


def write_training_texts(texts: TrainingTexts, folder: Path) -> None:
    """Write what `read_training_texts` reads."""
    write_json(folder / TEXTS, asdict(texts))


def read_training_texts(folder: Path) -> TrainingTexts:
    """What `write_training_texts` left in a model folder.

    Raises `ConfigError` if the file is damaged, or missing as an earlier release wrote the model.
    """
    return read_facts(TrainingTexts, folder / TEXTS)


def _own_words(view: View) -> set[str]:
    """The statements of a radiologist's text."""
    return statements(report_text.findings(view)) if report_text.own_words(view) else set()
