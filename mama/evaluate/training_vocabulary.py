"""Which classes of a task the training texts speak of: a model is not asked about words that it was never told."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mama.data import report_text
from mama.evaluate.tasks import Sentences
from mama.settings.schema import DataConfig
from shards.schema import Study

BETWEEN = re.compile(r"[;:,.]| and | with | in ")  # what separates the statements of a sentence


def statements(text: Sentences) -> set[str]:
    """The smallest statements of a text: "BI-RADS 4", "suspicious", "spiculated margin"."""
    return {part.strip() for sentence in text for part in BETWEEN.split(sentence)} - {""}


def training_statements(studies: Iterable[Study], config: DataConfig) -> set[str]:
    """All that the texts of these studies say beside the meta-information, written as `config` has them."""
    hidden = frozenset(report_text.META)
    found: set[str] = set()
    for study in studies:
        for view in study.views:
            found |= statements(report_text.text(study, view, config.style, hidden, config.tell_pathology))
    return found


def untaught(texts: list[list[Sentences]], said: set[str]) -> list[int]:
    """The classes, by number, of which nothing is `said` that tells them from the others; `texts` are their prompts."""
    of_class = [{part for text in variants for part in statements(text)} for variants in texts]
    others = [set().union(*of_class[:k], *of_class[k + 1 :]) for k in range(len(of_class))]
    return [k for k, own in enumerate(of_class) if not (own - others[k]) & said]
