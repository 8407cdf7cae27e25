from __future__ import annotations

from dataclasses import replace

import pytest

from mama.evaluate.tasks import load_task
from shards.schema import Labels
from tests.support.cohort import study


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("cancer", {"cancer": True}, 1),
        ("cancer", {"cancer": False}, 0),
        ("cancer", {"birads": 5}, None),
        ("malignancy", {"pathology": "malignant"}, 1),
        ("malignancy", {"pathology": "normal"}, 0),
        ("malignancy", {"pathology": "benign"}, None),
        ("malignancy", {}, None),
        ("birads", {"birads": 0}, 0),
        ("birads", {"birads": 6}, 6),
        ("birads", {}, None),
        ("density", {"density": "A"}, 0),
        ("density", {"density": "D"}, 3),
        ("density", {}, None),
    ],
)
def test_labels(task: str, labels: dict[str, object], expected: int | None) -> None:
    one = study(1, "train")
    view = replace(one.views[0], labels=Labels(**labels))  # type: ignore[arg-type]
    assert load_task(task).label_of(one, view) == expected
