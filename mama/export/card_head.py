"""The YAML head of a model card, which Hugging Face's hub reads: licence, data sets, figures with their intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCardData

from mama.export.card_facts import Facts
from mama.export.figures import Estimate, Metrics, Row
from mama.export.licences import licence_of, slug_of

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
METRICS = {"roc_auc": ("AUC", "auc"), "balanced_accuracy": ("balanced accuracy", "balanced_accuracy")}


def metadata(facts: Facts) -> ModelCardData:
    """The head of the card."""
    licence, name = licence_of(facts.sources, facts.bases)
    return ModelCardData(
        language="en",
        license=licence,
        license_name=name,
        library_name="mama-clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["mammography", "vision-language", "clip", "medical", "not-for-clinical-use"],
        datasets=[slug_of(one) for one in facts.sources],
        base_model=[base for base in facts.bases if HUB_NAME.fullmatch(base)] or None,
        model_name=facts.model.name,
        eval_results=(list(_results(facts.metrics)) if facts.metrics else None) or None,
    )


def _results(metrics: Metrics) -> Iterator[EvalResult]:
    data = metrics.data
    for name, task in metrics.tasks.items():
        for row in task.rows:
            for kind, (title, key) in METRICS.items():
                found: Estimate = getattr(row, key)
                if found.value is None:
                    continue
                yield EvalResult(
                    task_type="zero-shot-image-classification" if _is_zero_shot(row) else "image-classification",
                    dataset_type="+".join(map(slug_of, data.sources)),
                    dataset_name=f"{' + '.join(data.names)}, {data.patients} patients",
                    dataset_config=name,
                    dataset_split=data.split,
                    metric_type=kind,
                    metric_value=round(found.value, 4),
                    metric_name=_metric_name(f"{title} of {name}, {row.protocol}, by {row.unit}", found),
                    metric_args=_interval(found),
                )


def _metric_name(name: str, found: Estimate) -> str:
    """With the interval, as the hub's page shows the name and the value alone."""
    if found.low is None or found.high is None:
        return name
    return f"{name} (95 % interval {found.low:.3f} to {found.high:.3f})"


def _interval(found: Estimate) -> dict[str, float] | None:
    if found.low is None or found.high is None:
        return None
    return {"confidence": 0.95, "low": round(found.low, 4), "high": round(found.high, 4)}


def _is_zero_shot(row: Row) -> bool:
    return row.protocol == "zero-shot"
