"""Which classes of a task the training texts mention: zero-shot cannot work on words that training never showed."""

from __future__ import annotations

from mama.data.wording import Sentences, statements


def unmentioned(ensembles: list[list[Sentences]], mentioned: set[str]) -> list[int]:
    """The classes, by number, of which no statement that only their own class prompts make is `mentioned`."""
    of_class = [{part for text in texts for part in statements(text)} for texts in ensembles]
    others = [set().union(*of_class[:k], *of_class[k + 1 :]) for k in range(len(of_class))]
    return [k for k, own in enumerate(of_class) if not (own - others[k]) & mentioned]
