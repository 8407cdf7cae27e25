"""Results in words: the table that `mama eval` prints, and what the report shares with it."""

from __future__ import annotations

from typing import Any

Results = dict[str, dict[str, Any]]  # metrics.json by task, and that of "alignment"


def results_table(results: Results) -> str:
    """The main figures as text: one line for each task, protocol and model."""
    head = ("task", "protocol", "model", "AUC [95 %]", "balanced accuracy [95 %]", "chance", "images", "patients")
    lines = [head]
    for name, document in results.items():
        if name == "alignment":
            continue
        for row in document["rows"]:
            auc, accuracy = (shown(row["metrics"][key]) for key in ("auc", "balanced_accuracy"))
            chance = f"{document['chance']:.2f}" if document["chance"] else "n/a"
            sizes = (str(document["images"]), str(document["patients"]))
            mark = " *" if unmentioned_note(document) and row["protocol"] == "zero-shot" else ""
            lines.append((name, row["protocol"] + mark, row["model"], auc, accuracy, chance, *sizes))
        if not document["rows"]:
            lines.append((name, "no image with this label", "", "n/a", "n/a", "n/a", str(document["images"]), "0"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = [f"* {name}: {note}" for name, document in results.items() if (note := unmentioned_note(document))]
    return "\n".join([table[0], "-" * len(table[0]), *table[1:], *notes])


def unmentioned_note(document: dict[str, Any]) -> str | None:
    """A caveat for zero-shot figures of classes that the training texts never mention; None if there are none."""
    if not document.get("untaught"):
        return None
    names = ", ".join(document["untaught"])
    return (
        f"the training texts never mention what the class prompts say of {names}, "
        "so the model was not trained for these zero-shot figures"
    )


def shown(estimate: dict[str, Any]) -> str:
    """An estimate for readers: "0.912 [0.880, 0.940]", or "n/a"."""
    if estimate["value"] is None:
        return "n/a"
    interval = f" [{estimate['low']:.3f}, {estimate['high']:.3f}]" if estimate["low"] is not None else ""
    return f"{estimate['value']:.3f}{interval}"
