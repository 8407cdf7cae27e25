"""The map of any kind of lesion: what says that there is one, against what says that there is none.

It is the same in every image, with lesions and without. Cosines alone are not comparable between sentences, nor between
images: what all sentences about findings have in common falls out of the difference.

Letters: b images, s sentences, P patches of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mama.data import report_text
from mama.evaluate.class_prompts import described, view_with
from mama.settings.schema import Style
from shards.schema import Finding, Labels, Study

Sentence = tuple[tuple[str, ...], int]  # a text, and which of its sentences


@dataclass(frozen=True)
class AnyKind:
    """The sentences of the map: those about lesions, one at least, and the one that there is none."""

    lesions: tuple[Sentence, ...]
    normal: Sentence


def find(findings: Iterable[Finding], style: Style, fits: Callable[[Sentence], bool]) -> AnyKind | None:
    """The sentences about lesions of the kinds of these `findings`; None if no pair of sentences fits, or no finding.

    A kind that one of the findings describes is described as in the class prompts of typical cases, another is named
    alone: texts of an archive without descriptors never have them.
    """
    described_in: dict[str, bool] = {}
    for finding in findings:
        described_in[finding.kind] = described_in.get(finding.kind, False) or _has_descriptors(finding)
    typical = {kind: described_in[kind] and described(kind) for kind in sorted(described_in)}
    about = [one for kind, cases in typical.items() for one in cases or [Finding(1, kind)]]
    lesions = dict.fromkeys(sentence_about((one,), style) for one in about)
    fitting, normal = tuple(filter(fits, lesions)), sentence_about((), style)
    return AnyKind(fitting, normal) if fitting and fits(normal) else None


def _has_descriptors(finding: Finding) -> bool:
    return report_text.describe(finding) != report_text.describe(Finding(finding.number, finding.kind))


def sentence_about(findings: tuple[Finding, ...], style: Style) -> Sentence:
    """The text of an image of which nothing is known but its `findings`, and the sentence that names the first of them.

    Without findings that it has none, and the sentence that says so.
    """
    view = view_with(Labels(pathology=None if findings else "normal"), findings)
    text = report_text.text(Study("", "", "", "", (view,)), view, style, frozenset(report_text.META))
    named = report_text.finding_sentences(view, style, text) or text  # of one sentence, where no finding is named
    return tuple(text), text.index(named[0])


def document(sentences: AnyKind | None) -> dict[str, Any]:
    """The `sentences` about lesions, and the `normal` one, for the results."""
    lesions = sentences.lesions if sentences else ()
    normal = sentences and sentences.normal[0][sentences.normal[1]]
    return {"sentences": [text[number] for text, number in lesions], "normal": normal}


def difference(cosines: Tensor) -> Tensor:
    """Maps [b, P] of the cosines [b, s, P] with the sentences about lesions and, last, the one that there is none."""
    return cosines[:, :-1].amax(1) - cosines[:, -1]
