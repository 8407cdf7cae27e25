"""The sentences of the map of any kind of lesion, and the map, against lists and loops written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mama.evaluate import any_kind
from mama.evaluate.any_kind import AnyKind, Sentence, sentence_about
from mama.settings.schema import Style
from shards.schema import Finding

MASS = Finding(1, "mass", (0, 0, 1, 1), shape="oval")
MASSES = [
    "irregular mass, indistinct margin, high density",
    "irregular mass, spiculated margin, high density",
    "oval mass, circumscribed margin, equal density",
    "oval mass, circumscribed margin, low density",
    "round mass, circumscribed margin, equal density",
    "round mass, circumscribed margin, low density",
]
CALCIFICATIONS = [
    "coarse calcifications, grouped distribution",
    "fine linear or fine linear branching calcifications, linear distribution",
    "fine pleomorphic calcifications, grouped distribution",
    "round calcifications, grouped distribution",
]


def fits(sentence: Sentence) -> bool:
    return True


def said(found: AnyKind | None) -> list[str]:
    return sorted(any_kind.document(found)["sentences"])


def findings(*texts: str) -> list[str]:
    return [f"Findings: {text}." for text in texts]


def test_each_kind_is_described_as_in_the_class_prompts() -> None:
    found = any_kind.find([MASS, Finding(2, "mass")], "report", fits)
    assert said(found) == findings(*MASSES)
    assert any_kind.document(found)["normal"] == "Findings: no mass and no calcification."
    assert found is not None
    for text, number in (*found.lesions, found.normal):
        assert [sentence for sentence in text if sentence.startswith("Findings")] == [text[number]]
        assert not any(word in sentence for sentence in text for word in ("BI-RADS", "density A", "Pathology"))
    grouped = Finding(3, "calcification", distribution="grouped")
    assert said(any_kind.find([MASS, grouped], "report", fits)) == sorted(findings(*MASSES, *CALCIFICATIONS))
    focal = Finding(3, "asymmetry", shape="global")
    assert said(any_kind.find([focal], "report", fits)) == findings("developing asymmetry", "focal asymmetry")


def test_a_kind_without_descriptors_is_named_alone() -> None:
    """Neither an archive that describes no finding has such texts, nor is there a typical case of every kind."""
    bare = [Finding(1, "mass"), Finding(2, "calcification")]
    assert said(any_kind.find(bare, "report", fits)) == findings("calcifications", "mass")
    mixed = [MASS, Finding(2, "calcification"), Finding(3, "lymph node", shape="round"), Finding(4, "distortion")]
    expected = findings(*MASSES, "calcifications", "distortion", "lymph node")
    assert said(any_kind.find(mixed, "report", fits)) == sorted(expected)
    assert any_kind.find([], "report", fits) is None


@pytest.mark.parametrize(
    ("style", "lesion", "normal"),
    [
        ("sentence", "; it shows an oval mass with circumscribed margin and low density.", "; it shows no mass and no"),
        ("caption", "Mammogram, side unknown, view unknown, mass.", "Mammogram, side unknown, view unknown, normal."),
    ],
)
def test_other_styles_have_one_sentence(style: Style, lesion: str, normal: str) -> None:
    found = any_kind.find([MASS, Finding(2, "calcification", distribution="grouped")], style, fits)
    assert found is not None
    assert all((len(text), number) == (1, 0) for text, number in (*found.lesions, found.normal))
    sentences = [text[number] for text, number in found.lesions]
    assert len(sentences) == {"sentence": 10, "caption": 2}[style]  # a caption tells the kind alone
    assert any(sentence.endswith(lesion) for sentence in sentences)
    assert normal in found.normal[0][0]


def test_sentences_that_do_not_fit_are_left_out() -> None:
    def short(sentence: Sentence) -> bool:
        return len(sentence[0][sentence[1]]) < len("Findings: no mass and no calcification.") + 10

    found = any_kind.find([MASS, Finding(2, "calcification")], "report", short)
    assert said(found) == findings("calcifications")
    normal = sentence_about((), "report")
    assert any_kind.find([MASS], "report", lambda sentence: sentence == normal) is None
    assert any_kind.find([MASS], "report", lambda sentence: sentence != normal) is None


def test_the_map_is_the_highest_cosine_minus_that_of_none() -> None:
    cosines = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(0))
    cosines[1, :, 3] = torch.nan  # a patch that was not computed
    found = any_kind.difference(cosines).numpy()
    for image, patch in np.ndindex(2, 7):
        *lesions, normal = cosines[image, :, patch].tolist()
        expected = max(lesions) - normal if (image, patch) != (1, 3) else np.nan
        np.testing.assert_allclose(found[image, patch], expected, atol=1e-6)
