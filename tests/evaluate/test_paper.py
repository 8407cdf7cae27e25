"""The paper's protocol: its own settings, the balanced test subset, prompts with the image's own meta-information."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mama.data import report_text
from mama.data.held_out import Item
from mama.errors import ConfigError
from mama.evaluate import linear_probe
from mama.evaluate.evaluation import evaluate
from mama.evaluate.paper import balanced, zero_shot_scores
from mama.settings.paper import TUNING, resolved
from mama.settings.schema import Config, EvalConfig, FinetuneConfig, Style
from tests.support.cohort import study
from tests.support.oracle_run import install_oracle, oracle_config

PAPER = EvalConfig(protocol="paper")


def test_it_has_its_own_settings_and_refuses_others() -> None:
    own = resolved(Config(eval=PAPER, finetune=FinetuneConfig(micro_batch=4)))
    assert own.finetune == replace(TUNING, micro_batch=4)
    assert resolved(own) == own
    assert resolved(Config()).finetune == FinetuneConfig()
    with pytest.raises(ConfigError, match=r"^finetune.lr: 0.5, but eval.protocol=paper has 0.0005; leave it out$"):
        resolved(Config(eval=PAPER, finetune=FinetuneConfig(lr=0.5)))


def test_the_balanced_subset_has_a_tenth_of_each_class_or_200_images() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [5000, 1500, 200, 30]))
    rows = balanced(labels)
    assert np.bincount(labels[rows]).tolist() == [500, 200, 200, 30]
    assert np.array_equal(rows, np.unique(rows))
    assert np.array_equal(rows, balanced(labels))
    assert len(balanced(labels[:0])) == 0


@pytest.mark.parametrize("style", ["report", "sentence", "caption"])
def test_a_prompt_with_an_images_own_facts_is_the_text_of_that_image(style: Style) -> None:
    one = replace(study(3, "test"), race="White", ethnicity="Not Hispanic")
    for view in one.views:
        hidden = report_text.text(one, view, style, frozenset(report_text.META))
        assert report_text.with_meta(hidden, one, view) == report_text.text(one, view, style)
        assert hidden != report_text.text(one, view, style)
    anonymous = replace(one, age=None)
    shown = report_text.with_meta(hidden, anonymous, view)
    assert shown == report_text.text(anonymous, view, style)


def test_every_image_is_compared_with_prompts_of_its_own_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few texts are embedded at once, and in whatever order the images come."""
    studies = [replace(study(number, "test"), age=50 + number % 3) for number in range(8)]
    items = [Item(number, place, s) for number, s in enumerate(studies) for place in range(len(s.views))]
    ensembles = [
        [report_text.text(s, s.views[0], "report", frozenset(report_text.META)) for s in part]
        for part in (studies[:1], studies[1:4])
    ]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(items), 6)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    rows = rng.permutation(len(items))[:20]

    @cache
    def vector(text: tuple[str, ...]) -> NDArray[np.float32]:
        found = np.random.default_rng(zlib.crc32(repr(text).encode())).normal(size=6).astype(np.float32)
        return found / np.linalg.norm(found)

    expected = []
    for row in rows:
        item = items[row]
        own = [[vector(tuple(report_text.with_meta(t, item.study, item.view))) for t in texts] for texts in ensembles]
        means = [np.mean(texts, axis=0, dtype=np.float64) for texts in own]
        odds = [np.exp(7 * images[row] @ mean / np.linalg.norm(mean)) for mean in means]
        expected.append([odd / sum(odds) for odd in odds])
    for at_once in (1, 9, 2048):
        monkeypatch.setattr("mama.evaluate.paper.TEXTS", at_once)
        found = zero_shot_scores(
            ensembles, items, rows, images, lambda texts: np.stack([vector(tuple(text)) for text in texts]), 7.0
        )
        assert np.abs(found - expected).max() < 1e-6


def test_sgd_finds_what_a_solver_finds() -> None:
    """The optimum of the balanced loss with the same penalty, which scikit-learn's solver goes to directly."""
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.2).astype(np.int64) + 3  # classes 3 and 4
    features = rng.normal(size=(400, 5)) + (labels[:, None] == 4) * np.array([1.0, -1, 0, 0, 0.5])
    tuning = replace(TUNING, steps=4000, lr=0.1, min_lr=1e-4, weight_decay=0.02)
    found = linear_probe.fit_by_sgd(features.astype(np.float32), labels, 0, tuning)
    assert found.classes_.tolist() == [3, 4]
    # Two weights of opposite sign, w/2 each, are decayed like one weight w at half the penalty.
    exact = LogisticRegression(C=1 / (400 * 0.02 / 2), class_weight="balanced", max_iter=1000).fit(features, labels)
    expected = exact.predict_proba(features)
    assert np.abs(found.predict_proba(features) - expected).max() < 0.03
    assert np.abs(linear_probe.probabilities(found, features, 5)[:, 3:] - expected).max() < 0.03


def test_the_whole_protocol_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = oracle_config(tmp_path)
    oracle = install_oracle(config, monkeypatch)
    seen: set[str] = set()
    read = oracle._read

    def watched(tokens: Tensor) -> Tensor:
        seen.add(oracle._words(tokens))
        return read(tokens)

    monkeypatch.setattr(oracle, "_read", watched)
    measured = replace(config.eval, protocol="paper", tasks=["cancer"], bootstrap=0, intensity_baseline=False)
    monkeypatch.setattr("mama.settings.paper.TUNING", replace(TUNING, steps=300, lr=0.1))
    rows = evaluate(replace(config, eval=measured), config.run_folder)["cancer"]["rows"]
    assert {(r["protocol"], r["model"]): r["metrics"]["auc"]["value"] for r in rows if r["model"] == "trained"} == {
        ("zero-shot", "trained"): 1.0,
        ("linear probe", "trained"): 1.0,
    }
    prompts = {text for text in seen if "BI-RADS" in text and "Patient" in text}
    assert {side for text in prompts if "age 50 years" in text for side in re.findall("side (\\w+)", text)} >= {
        "left",
        "right",
    }
