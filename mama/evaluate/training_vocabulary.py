"""Which classes of a task the training texts mention: zero-shot cannot work on words that training never showed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

from mama.data import report_text
from mama.evaluate.class_prompts import Sentences
from mama.settings.schema import DataConfig
from shards.schema import Study

SEPARATORS = re.compile(r"[;:,.]| and | with | in ")  # between the statements of a sentence


def statements(text: Sentences) -> set[str]:
    """The smallest statements of a text: "BI-RADS 4", "suspicious", "spiculated margin"."""
    return {part.strip() for sentence in text for part in SEPARATORS.split(sentence)} - {""}


def training_statements(studies: Iterable[Study], config: DataConfig) -> set[str]:
    """All statements of these studies' texts, written with the settings of `config` and no meta-information."""
    hidden = frozenset(report_text.META)
    views = ((study, view) for study in studies for view in study.views)
    texts = (report_text.text(study, view, config.style, hidden, config.tell_pathology) for study, view in views)
    return set(chain.from_iterable(map(statements, texts)))


def unmentioned(ensembles: list[list[Sentences]], mentioned: set[str]) -> list[int]:
    """The classes, by number, of which no statement that only their own class prompts make is `mentioned`."""
    of_class = [{part for text in texts for part in statements(text)} for texts in ensembles]
    others = [set().union(*of_class[:k], *of_class[k + 1 :]) for k in range(len(of_class))]
    return [k for k, own in enumerate(of_class) if not (own - others[k]) & mentioned]
