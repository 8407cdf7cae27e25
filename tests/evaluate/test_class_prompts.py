from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import get_args

import pytest

from mama.data import report_text
from mama.data.wording import Wording, wording_of
from mama.evaluate.class_prompts import prompt_ensembles
from mama.evaluate.tasks import TASKS, load_task
from shards.schema import Finding, Labels, View
from tests.support.cohort import only, study

CANCER = study(1, "train").views[0]


def labelled(**labels: object) -> View:
    return replace(CANCER, labels=Labels(**labels))  # type: ignore[arg-type]


def test_every_class_has_texts_that_differ_from_all_other_classes() -> None:
    for wording in (
        Wording(),
        Wording(style="sentence"),
        Wording(style="caption"),
        Wording(density=False, birads=False, style="sentence"),
        Wording(reasons=(None, "screening"), reports=True),
        Wording(density=False, birads=False),
        Wording(descriptors=False, assessed=True, style="caption"),
        Wording(density=False, birads=False, descriptors=False, outcomes=("benign", "malignant", "normal")),
        Wording(birads=False, descriptors=False, outcomes=("malignant", "not malignant"), style="sentence"),
        Wording(density=False, birads=False, descriptors=False),
    ):
        for task in map(load_task, TASKS):
            texts = [{tuple(text) for text in ensemble} for ensemble in prompt_ensembles(task, wording)]
            assert len(texts) == len(task.classes)
            assert all(texts), task.name
            if task.name != "birads" or wording.birads:
                pairs = [a & b for i, a in enumerate(texts) for b in texts[:i]]
                assert not any(pairs), task.name


def test_the_prompts_of_figures_that_were_published_do_not_change() -> None:
    """Every text of the first four tasks, in their order, with the contents of several data sets."""
    wordings = [
        *(Wording(style=style) for style in get_args(report_text.Style)),
        Wording(reasons=(None, "screening"), birads=False, assessed=True),
        Wording(density=False, reports=True, descriptors=False),
        Wording(birads=False, descriptors=False, outcomes=("benign", "malignant", "normal")),
    ]
    tasks = [load_task(name) for name in ("cancer", "malignancy", "birads", "density")]
    texts = [prompt_ensembles(task, wording) for task in tasks for wording in wordings]
    assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == "e397bd20041952e2"


def test_density_prompts_have_the_sentence_of_training_and_hide_the_rest() -> None:
    for density, ensemble in zip("ABCD", prompt_ensembles(load_task("density"), Wording()), strict=True):
        sentence = report_text.composition(labelled(density=density))[0]
        assert sentence == f"Composition: density {density}, the breast is {report_text.COMPOSITION[density]}."
        for text in ensemble:
            assert sentence in text
            assert text[1] == "Patient: age unknown, race unknown, ethnicity unknown."
            assert text[2] == "Image: type unknown, side unknown, view unknown."
        others = {s for text in ensemble for s in text if s.startswith("Impression")}
        assert len(others) >= 4  # the answer must not hang on one assessment


@pytest.mark.parametrize("style", ["report", "sentence", "caption"])
@pytest.mark.parametrize("words", [None, "Heterogenously enhancing mass"])
def test_a_training_text_is_among_the_texts_of_its_class(style: report_text.Style, words: str | None) -> None:
    # With `words`, only the left view of the first patient has them.
    for number, view in ((1, 0),) if words else ((1, 0), (1, 1), (5, 0)):
        one = study(number, "train", words)
        one = replace(
            one, views=tuple(replace(v, labels=replace(v.labels, birads=4)) if words else v for v in one.views)
        )
        text = report_text.text(one, one.views[view], style, frozenset(report_text.META))
        wording = wording_of([one], style)
        for name in ("cancer", "malignancy", "birads", "density"):
            label = load_task(name).label_of(one, one.views[view])
            assert label is not None
            found = [text in ensemble for ensemble in prompt_ensembles(load_task(name), wording)]
            assert found.index(True) == label, (name, found)
            assert sum(found) == 1


@pytest.mark.parametrize("style", ["report", "sentence", "caption"])
@pytest.mark.parametrize("known", [("birads",), ("birads", "density", "cancer"), ("pathology",), ("cancer", "density")])
def test_also_for_a_table_with_few_columns(style: report_text.Style, known: tuple[str, ...]) -> None:
    """Assessments without descriptors, and pathology alone: the class prompts have the words of the training texts."""
    studies = [only(study(number, "train"), known) for number in range(8)]
    wording = wording_of(studies, style, tell_pathology=True)
    hidden = frozenset(report_text.META)
    for one in studies:
        for name in ("cancer", "malignancy", "birads", "density"):
            for view in one.views:
                label = load_task(name).label_of(one, view)
                if label is not None:
                    text = report_text.text(one, view, style, hidden, tell_pathology=True)
                    found = [text in ensemble for ensemble in prompt_ensembles(load_task(name), wording)]
                    assert [k for k, is_in in enumerate(found) if is_in] == [label], (name, text)


def test_prompts_state_only_the_kinds_of_facts_of_the_data_set() -> None:
    bare = replace(CANCER, labels=Labels(cancer=True))
    one = replace(study(1, "train"), views=(bare,), reason="diagnostic")
    wording = wording_of([one])
    assert wording == Wording(("diagnostic",), density=False, birads=False, reports=False)
    for text in (t for ensemble in prompt_ensembles(load_task("cancer"), wording) for t in ensemble):
        assert text[0] == "Procedure: diagnostic mammogram."
        assert not any(s.startswith(("Composition", "Impression")) for s in text)
    free = wording_of([study(1, "train", words="Heterogenously enhancing mass")])
    assert free.reports
    texts = prompt_ensembles(load_task("malignancy"), free)[1]
    findings = [s for text in texts for s in text if s.startswith("Findings")]
    assert findings
    assert all("enhanc" in sentence for sentence in findings)


def test_descriptors_are_those_that_the_report_text_writes() -> None:
    finding = Finding(1, "mass", shape="irregular", margin="spiculated", density="high")
    texts = prompt_ensembles(load_task("cancer"), Wording())[1]
    assert any(f"Findings: {report_text.describe(finding)}." in text for text in texts)
