"""Retrieval by the local alignment: against scikit-learn, plain loops, and cohorts in which patients are repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from mama.data import report_text
from mama.data.held_out import Item, Split
from mama.data.tokenizer import learn
from mama.evaluate import local_retrieval, localisation
from mama.evaluate.arrays import Float32s
from mama.evaluate.local_retrieval import NORMAL, OWN, TEXT, Asked, Embedded, is_lesion_free
from mama.evaluate.pointing import Target
from mama.settings.schema import Config, EvalConfig, LossConfig, Style
from shards.schema import Finding, Labels, View
from tests.support.cohort import Oracle, study, write_shards
from tests.support.oracle_run import oracle_config

MASS, FINE = Finding(1, "mass", None, "irregular"), Finding(2, "calcification", None, calcification_type="fine")
NOT_NORMAL = "no image of this split is lesion-free by its facts"
CPU = torch.device("cpu")


def item(patient: str, *findings: Finding, labels: Labels | None = None, words: str | None = None) -> Item:
    one = study(0, "test")
    view = replace(one.views[0], findings=findings, report=words)
    if labels or findings or words:
        view = replace(view, labels=labels or Labels(4, "A"))
    return Item(0, 0, replace(one, patient=patient, views=(view,)))


def targets_of(items: list[Item], style: Style = "report") -> list[Target]:
    """One for each sentence about a finding."""
    found = []
    for row, one in enumerate(items):
        text = report_text.text(one.study, one.view, style, frozenset(report_text.META))
        named = report_text.finding_sentences(one.view, style, text)
        told = named[: one.view.labels.pathology == "malignant"] if one.view.report else named[: len(one.view.findings)]
        found += [Target(row, one, text, text.index(sentence), ()) for sentence in dict.fromkeys(told)]
    return found


def asked_of(items: list[Item], style: Style = "report", **loss: Any) -> Asked:
    fits = lambda text, number: True  # noqa: E731
    return local_retrieval.ask(targets_of(items, style), items, style, fits, LossConfig(**loss))


def drawn(random: np.random.Generator, images: int, asked: Asked, texts: int) -> Embedded:
    """Scores with many ties, and embeddings without."""
    scores = random.integers(0, 6, (images, len(asked.sentences))).astype(np.float32)
    vectors = random.normal(size=(images + texts, 8)).astype(np.float32)
    return Embedded(scores, vectors[:images], vectors[images:])


def naive(own: Float32s, others: list[Float32s]) -> list[float]:
    return [
        roc_auc_score([1] + [0] * len(free), [value, *free.tolist()]) for value, free in zip(own, others, strict=True)
    ]


COHORT = [
    item("a", MASS, FINE), item("a"), item("b", MASS), item("c"), item("d", FINE), item("d"), item("e"), item("b"),
    item("f", labels=Labels(2, "B")), item("g", MASS),
]  # fmt: skip
TEXT_OF = [0, 1, 0, 1, 2, 1, 1, 1, 3, 4]


def test_the_mean_auc_of_the_targets_against_scikit_learn() -> None:
    random, asked, targets = np.random.default_rng(0), asked_of(COHORT), targets_of(COHORT)
    assert [target.row for target in targets] == [0, 0, 2, 4, 9]
    assert asked.lesion_free == [1, 3, 5, 6, 7]
    rows = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # read in any order
    models = {name: drawn(random, 10, asked, 5) for name in ("trained", "untrained")}
    config = Config(eval=EvalConfig(bootstrap=100))
    found = local_retrieval.document(models, TEXT_OF, asked, rows, targets, COHORT, config)
    counts = [found[key] for key in ("targets", "patients", "lesion_free", "lesion_free_patients")]
    assert counts == [5, 4, 5, 5]
    assert found["normal"] == ["Findings: no mass and no calcification."]
    expected: dict[tuple[str, str], list[float]] = {}
    for name, one in models.items():
        by_row = one.scores[::-1]  # of row 0, 1, ...
        free = by_row[asked.lesion_free]
        expected[name, OWN] = naive(
            by_row[[t.row for t in targets], asked.own], [free[:, number] for number in asked.own]
        )
        cosines = one.images @ one.texts[[TEXT_OF[t.row] for t in targets]].T  # [n, t]
        expected[name, TEXT] = naive(cosines[[t.row for t in targets], range(5)], list(cosines[asked.lesion_free].T))
        if name == "trained":
            normal = [number for number in asked.normal if number is not None]
            expected[name, NORMAL] = naive(by_row[[t.row for t in targets], normal], [free[:, n] for n in normal])
    got = {(row["model"], row["by"]): row for row in found["rows"]}
    assert list(got) == [
        ("trained", OWN),
        ("untrained", OWN),
        ("trained", NORMAL),
        ("trained", TEXT),
        ("untrained", TEXT),
    ]
    assert got.keys() == expected.keys()
    own = np.mean(expected["trained", OWN])
    for key, areas in expected.items():
        assert got[key]["auc"]["value"] == pytest.approx(np.mean(areas)), key
        assert 0 <= got[key]["auc"]["low"] < np.mean(areas) < got[key]["auc"]["high"] <= 1
        if key == ("trained", OWN):
            assert "difference" not in got[key]
        else:
            assert got[key]["difference"]["value"] == pytest.approx(own - np.mean(areas)), key
            assert got[key]["difference"]["low"] < own - np.mean(areas) < got[key]["difference"]["high"]
    kinds = {one["name"]: one for one in found["strata"]}
    for name, among, patients in (("mass", [0, 2, 4], 3), ("calcification", [1, 3], 2)):
        assert (kinds[name]["targets"], kinds[name]["patients"]) == (len(among), patients)
        of_kind = {(row["model"], row["by"]): row["auc"]["value"] for row in kinds[name]["rows"]}
        for key, areas in expected.items():
            assert of_kind[key] == pytest.approx(np.mean(np.array(areas)[among])), (name, key)


def test_a_resample_is_a_cohort_in_which_each_patient_is_as_often_as_he_was_drawn() -> None:
    """On both sides, also one who has targets and lesion-free images."""
    random = np.random.default_rng(1)
    targets, others = list("aabcd"), list("aacdefg")
    own, free = random.integers(0, 5, 5).astype(np.float32), random.integers(0, 5, (5, 7)).astype(np.float32)
    compared = local_retrieval._Compared(targets, others)
    compared.add(own, list(free))
    flags = np.array([True, True, True, False, True])
    config = Config(eval=EvalConfig(bootstrap=60))
    (part,) = compared.parts([(0, flags)], config)
    assert part.patients == 3
    assert compared.patients == 7
    weightings = np.random.default_rng(config.seed).multinomial(7, np.full(7, 1 / 7), size=60)
    for value, weights in zip([part.value, *part.draws], [np.ones(7, int), *weightings], strict=True):
        times = dict(zip("abcdefg", weights, strict=True))
        chosen = [n for n, patient in enumerate(targets) if flags[n] for _ in range(times[patient])]
        against = [n for n, patient in enumerate(others) for _ in range(times[patient])]
        if not chosen or not against:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(np.mean(naive(own[chosen], list(free[chosen][:, against]))))


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("tissue", [False, True])
def test_the_score_of_an_image_is_what_the_objective_makes_of_its_cosines(
    temperature: float | None, tissue: bool
) -> None:
    """The maximum, or the mean by a softmax, over the patches that were computed."""
    random = torch.Generator().manual_seed(0)
    sentences, patches = torch.randn(4, 6, generator=random), torch.randn(3, 9, 6, generator=random)
    sentences, patches = (torch.nn.functional.normalize(one, dim=-1) for one in (sentences, patches))
    if tissue:
        patches[0, 2:5], patches[2, 1:] = torch.nan, torch.nan
    found = local_retrieval.scores(list(sentences), patches, temperature)
    assert found.shape == (3, 4)
    assert found.dtype == np.float32
    for image, sentence in np.ndindex(3, 4):
        cosines = patches[image].double().numpy() @ sentences[sentence].double().numpy()
        cosines = cosines[~np.isnan(cosines)]
        expected = cosines.max() if temperature is None else (softmax(cosines / temperature) * cosines).sum()
        assert found[image, sentence] == pytest.approx(expected, abs=1e-6)
    assert local_retrieval.scores([], patches, temperature).shape == (3, 0)


def test_which_images_are_free_of_lesions() -> None:
    def view(labels: Labels, *findings: Finding) -> View:
        return replace(study(0, "test").views[1], labels=labels, findings=findings)

    normal = [Labels(1), Labels(1, cancer=False), Labels(pathology="normal"), Labels(2, pathology="normal")]
    others = [Labels(), Labels(2), Labels(0), Labels(cancer=False), Labels(density="A"), Labels(1, cancer=True),
              Labels(1, pathology="benign"), Labels(6, pathology="normal"), Labels(4, pathology="normal")]  # fmt: skip
    assert [is_lesion_free(view(labels)) for labels in normal] == [True] * 4
    assert [is_lesion_free(view(labels)) for labels in others] == [False] * 9
    assert not is_lesion_free(view(Labels(1), MASS))


def test_the_normal_sentence_is_that_of_the_same_image_without_findings() -> None:
    for style in get_args(Style):
        asked, targets = asked_of(COHORT, style), targets_of(COHORT, style)
        for target, own, normal in zip(targets, asked.own, asked.normal, strict=True):
            assert asked.sentences[own] == (tuple(target.text), target.sentence)
            assert normal is not None
            text, number = asked.sentences[normal]
            view = replace(target.item.view, findings=(), labels=Labels(None, "A", None, "normal"))
            assert list(text) == report_text.text(target.item.study, view, style, frozenset(report_text.META))
            if style == "report":
                assert text[number] == "Findings: no mass and no calcification."
                assert text[:number] == tuple(target.text[:number]) or number == 4
                assert not any("BI-RADS" in sentence for sentence in text)
            else:
                assert (len(text), number) == (1, 0)
    assert len(asked_of(COHORT).sentences) == 5  # of three distinct texts, one with two findings; all normal ones equal


def test_radiologists_texts_get_the_words_that_radiologists_have_for_normal_images() -> None:
    sick = item("a", labels=Labels(4, "A", None, "malignant"), words="Irregular mass.\nSkin thickening.")
    words = ["Nothing seen", "No enhancement", "Nothing seen", None]
    items = [sick, *(item(str(n), labels=Labels(1, "A"), words=one) for n, one in enumerate(words))]
    asked = asked_of(items, "caption")  # such texts are reports in every style
    (own,), (normal,) = asked.own, asked.normal
    assert normal is not None
    text, number = asked.sentences[own]
    assert text[number] == "Findings: Irregular mass."
    text, number = asked.sentences[normal]
    assert text[number] == "Findings: Nothing seen."
    assert not any("mass" in sentence or "thickening" in sentence or "BI-RADS" in sentence for sentence in text)
    plain = asked_of([sick, item("b")])
    text, number = plain.sentences[plain.normal[0] or 0]
    assert text[number] == "Findings: no mass and no calcification."


def measured(items: list[Item], resamples: int = 50, seen: float = 1.0, fits: bool = True) -> dict[str, Any]:
    """By a model whose score is 1 in the images of targets, and `seen` elsewhere."""
    targets = targets_of(items)
    asked = local_retrieval.ask(
        targets, items, "report", lambda text, number: fits or "no mass" not in text[number], LossConfig()
    )
    scores = np.full((len(items), len(asked.sentences)), seen, np.float32)
    scores[[target.row for target in targets]] = 1
    model = Embedded(scores, np.ones((len(items), 2), np.float32), np.ones((1, 2), np.float32))
    config = Config(eval=EvalConfig(bootstrap=resamples))
    return local_retrieval.document(
        {"trained": model}, [0] * len(items), asked, range(len(items)), targets, items, config
    )


def test_where_there_is_nothing_to_compare_it_says_so() -> None:
    for items, why in (
        ([item("a", MASS)], NOT_NORMAL),
        ([item("a", MASS), item("b", labels=Labels(2, "A"))], NOT_NORMAL),
        ([item("a")], "no sentence of this split tells a finding"),
    ):
        found = measured(items)
        assert found["rows"] == found["strata"] == []
        assert found["reason"] == why


def test_ties_are_one_half_and_one_patient_has_no_interval() -> None:
    for seen, expected in ((1.0, 0.5), (0.0, 1.0), (2.0, 0.0)):
        rows = measured([item("a", MASS), item("b"), item("c")], seen=seen)["rows"]
        assert [row["auc"]["value"] for row in rows] == [expected, expected, 0.5]
    (row, *_) = measured([item("a", MASS), item("a")], seen=0.0)["rows"]
    assert (row["auc"]["value"], row["auc"]["low"]) == (1.0, None)
    assert row["auc"]["reason"] == "no interval: the images are of one patient"
    (row, *_) = measured([item("a", MASS), item("b")], seen=0.0)["rows"]
    assert (row["auc"]["value"], row["auc"]["low"]) == (1.0, None)
    assert row["auc"]["reason"] is not None
    (row, *_) = measured([item("a", MASS), item("b")], resamples=0, seen=0.0)["rows"]
    assert (row["auc"]["value"], row["auc"]["low"]) == (1.0, None)


def test_a_normal_sentence_that_is_cut_off_is_not_asked() -> None:
    found = measured([item("a", MASS), item("b"), item("c")], fits=False)
    assert [row["by"] for row in found["rows"]] == [OWN, TEXT]
    assert found["normal"] == []


@pytest.mark.parametrize("style", get_args(Style))
@pytest.mark.parametrize("pooling", ["max", "softmax"])
def test_one_pass_over_the_images_scores_all_that_is_asked(tmp_path: Path, style: Style, pooling: Any) -> None:
    """The oracle sees the grey of patches for a mass, and its opposite for all else."""
    config = oracle_config(tmp_path)
    config = replace(config, data=replace(config.data, style=style), loss=LossConfig(local_pooling=pooling))
    split = Split(config, "test")
    tokenizer = learn((s for i in split.items for s in report_text.text(i.study, i.view, style)), 400)
    sought = localisation.search(split, tokenizer, 200, config.loss)
    assert sought.asked.lesion_free == [row for row, one in enumerate(split.items) if not one.view.findings]
    assert set(sought.rows) >= {target.row for target in sought.targets} | set(sought.asked.lesion_free)
    maps = localisation.maps(Oracle(tokenizer), tokenizer, split, sought, config, CPU)  # type: ignore[arg-type]
    assert maps.scores.shape == (len(sought.rows), len(sought.asked.sentences))
    for column, (text, number) in enumerate(sought.asked.sentences):
        says_mass = "mass" in text[number] and "no mass" not in text[number]
        cosines = (maps.grey / 127.5 - 1) * (1 if says_mass else -1)
        flat = cosines.reshape(len(cosines), -1)
        expected = flat.max(1) if pooling == "max" else (softmax(flat / 0.1, axis=1) * flat).sum(1)
        np.testing.assert_allclose(maps.scores[:, column], expected, atol=1e-5)


def test_of_radiologists_words_alone_lesion_free_images_are_read_too(tmp_path: Path) -> None:
    config = oracle_config(tmp_path)
    write_shards(tmp_path / "words", {"test": 4}, words="Enhancing mass")
    split = Split(replace(config, data=replace(config.data, shards=[str(tmp_path / "words")])), "test")
    tokenizer = learn((s for i in split.items for s in report_text.text(i.study, i.view, "report")), 400)
    sought = localisation.search(split, tokenizer, 200, config.loss)
    assert ([target.row for target in sought.targets], sought.any_kind) == ([2, 6], None)
    assert sought.asked.lesion_free == [0, 1, 3, 4, 5, 7]
    assert sought.rows == list(range(8))
