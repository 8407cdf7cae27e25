"""The model card: `README.md` of a model folder, with a head that Hugging Face's hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mama.export.card_facts import Adapter, Facts, facts_of
from mama.export.card_head import metadata
from mama.export.card_texts import (
    ADAPTED,
    ALL_PATCHES,
    CALIBRATED,
    CUT,
    FROM_PYTHON,
    HEAD,
    HOW_MEASURED,
    MERGED,
    NO_RELEASE,
    NOT_EVALUATED,
    PLAIN,
    POINTED,
    PREPARED,
    TISSUE_ONLY,
)
from mama.export.figures import Estimate, Pointing, Weights, carry_figures
from mama.export.licences import terms_of
from mama.export.preprocessing import Preprocessing
from mama.export.training_texts import TrainingTexts
from mama.model.tissue import DARKEST
from mama.model.vision_tower import VISION_MODELS
from shards.files import atomic_write

CARD = "README.md"
# Where the blocks of an image tower are, if not in `encoder.layer`, and what they need beside the tokens.
BLOCKS = {"vit": "layers", "dinov3_vit": "model.layer"}
TURNED = ", position_embeddings=tuple(part[kept] for part in vision.rope_embeddings(image))"


def write_card(folder: Path) -> None:
    """Write README.md from what the files of a model folder say. Raises `ConfigError` if one is missing or damaged."""
    atomic_write(folder / CARD, card(facts_of(folder)).encode())


def add_card(folder: Path, earlier: Iterable[Path]) -> None:
    """Write the card of a new model folder, with the figures of the first of the `earlier` ones of its checkpoint.

    After its digests, which cover neither: an evaluation writes them anew. Raises as `write_card` does.
    """
    carry_figures(earlier, folder)
    write_card(folder)


def card(facts: Facts) -> str:
    """Markdown with a YAML head."""
    model, config = facts.model, facts.config
    warnings = [NO_RELEASE.format(name=terms_of(s).title) for s in facts.sources if not terms_of(s).release]
    head = HEAD.format(name=model.name, step=model.step, steps=model.steps, size=_times(config.data.image_size))
    sections = {
        "": "\n\n".join([*warnings, head]),
        "Figures": _figures(facts),
        "How to use it": _usage(facts),
        "Training data and licences": _data(facts),
        "Images": _images(facts.preprocessing),
        "Texts": _texts(facts.texts),
        "Settings": _settings(facts),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n{body}\n"


def _figures(facts: Facts) -> str:
    metrics = facts.metrics
    if metrics is None:
        return NOT_EVALUATED
    data = metrics.data
    head = ("task", "protocol", "of", "AUC [95 %]", "balanced accuracy [95 %]", "n", "patients")
    rows = [
        (name, row.protocol, row.unit, _shown(row.auc), _shown(row.balanced_accuracy), row.n, row.patients)
        for name, task in metrics.tasks.items()
        for row in task.rows
    ]
    tasks = [
        f"* `{name}`: {_cell(task.title)} ({', '.join(map(_cell, task.classes))})"
        for name, task in metrics.tasks.items()
    ]
    where = f"The split `{data.split}` of {_listed(data.names)}: {data.patients} patients, {data.images} images"
    lines = [f"{where}. {_known(data.known)} {HOW_MEASURED}"]
    if facts.weights.model != metrics.model:
        lines.append(_other_weights(metrics, facts.weights))
    lines += [_table(head, rows), "\n".join(tasks)]
    if metrics.pointing:
        lines.append(_pointed(metrics.pointing))
    return "\n\n".join([*lines, CALIBRATED] if facts.calibrated else lines)


def _other_weights(measured: Weights, own: Weights) -> str:
    """A sentence: figures of the same checkpoint were not measured with these very weights."""
    if (measured.dtype, measured.lora) == (own.dtype, own.lora):
        return "They were measured with an earlier export of this checkpoint: scores may differ in the last digits."
    kind = {"merged": "LoRA merged", "adapter": "LoRA as an adapter"}[measured.lora]
    return (
        f"They were measured with other weights of the same checkpoint: {measured.dtype}, {kind}. These here are "
        f"{own.dtype}, and their scores may differ in the last digits."
    )


def _known(patients: int | None) -> str:
    if patients is None:
        return "Whether it was trained on some of these patients was not checked."
    return f"It was trained on {patients or 'none'} of these patients."


def _pointed(found: Pointing) -> str:
    beside = {"of a random patch of tissue": found.chance, "of the brightest patch": found.brightest}
    told = "; ".join(f"{name} {value:.3f}" for name, value in beside.items() if value is not None)
    return POINTED.format(
        findings=found.findings, patients=found.patients, rate=_shown(found.hit_rate), beside=f" ({told})" * bool(told)
    )


def _usage(facts: Facts) -> str:
    adapter = facts.adapter
    only_tissue = facts.config.vision.tokens == "tissue"
    plain = PLAIN.format(
        tokens=" and over those patches alone that hold tissue" if only_tissue else "",
        functions="max_pool2d, " if only_tissue else "",
        imports="\nfrom peft import PeftModel" if adapter else "",
        text=_adapted(adapter) if adapter else MERGED,
        norm=VISION_MODELS[facts.image_model],
        images=(TISSUE_ONLY if only_tissue else ALL_PATCHES).format(
            arguments=", interpolate_pos_encoding=True" if facts.image_model == "vit" else "",
            darkest=DARKEST,
            blocks=BLOCKS.get(facts.image_model, "encoder.layer"),
            turned=TURNED if facts.image_model == "dinov3_vit" else "",
        ),
        max_tokens=facts.config.data.max_tokens,
    )
    return f"{FROM_PYTHON}\n\n{plain}"


def _adapted(adapter: Adapter) -> str:
    cut = CUT.format(blocks=adapter.blocks, layers=adapter.layers) if adapter.layers else ""
    *_, file = adapter.base.split("/")
    base = f'"its folder", gguf_file="{file}"' if file.endswith(".gguf") else f'"{adapter.base}"'
    return ADAPTED.format(base=base, vocabulary=adapter.vocabulary, cut=cut)


def _data(facts: Facts) -> str:
    head = ("shards", "data set", "patients", "studies", "images", "terms")
    rows = [
        (one.name, terms_of(one.source).title, one.patients, one.studies, one.images, terms_of(one.source).sentence)
        for one in facts.preprocessing.sources
    ]
    lines = ["These terms decide whether, and to whom, you may pass the model on:", _table(head, rows)]
    if facts.bases:
        lines.append(f"It began with pretrained weights, whose licences hold too: {_listed(facts.bases)}.")
    lines.append(
        "`trained_on.safetensors` has hashes of the patients and images, so that nobody measures the model on them by "
        "mistake. They name nobody."
    )
    return "\n\n".join(lines)


def _images(made: Preprocessing) -> str:
    picture = made.picture
    steps = [
        f"side of at most {picture.long_side} pixels, {picture.bits} bits",
        "cropped to the breast, black outside of it" if picture.crop else "not cropped",
        "chest wall on the left" if picture.flip else "not mirrored",
        f"JPEG of quality {made.quality}" if made.quality else "PNG",
        f"canvas of {_times(made.canvas.size)} pixels ({made.canvas.fit})",
        f"grey values from {made.range[0]:g} (black) to {made.range[1]:g} (white)",
    ]
    raw = "Raw images (FOR PROCESSING) were rendered." if picture.process_raw else ""
    return " ".join([PREPARED, "; ".join(steps) + ".", raw]).strip()


def _texts(texts: TrainingTexts) -> str:
    wording = texts.wording
    parts = {
        "breast density": wording.density,
        "BI-RADS": wording.birads,
        "BI-RADS descriptors of findings": wording.descriptors,
        "radiologists' own words": wording.reports,
        "the pathology": bool(wording.outcomes),
    }
    told = [name for name, is_told in parts.items() if is_told]
    return (
        f"The training texts are of the style `{wording.style}` and state {_listed(told) if told else 'no finding'}. "
        "`texts.json` has their wording and their statements; words that they never use were not taught."
    )


def _settings(facts: Facts) -> str:
    config = facts.config
    shown = {
        "image_size": list(config.data.image_size),
        "seed": config.seed,
        "vision": config.vision.model,
        "text": config.text.model,
        "dtype": facts.model.dtype,
        "lora": facts.model.lora,
        "mama-clip": facts.model.release,
    }
    return f"`config.yaml` has all those of the training.\n\n```json\n{json.dumps(shown, indent=2)}\n```"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *([_cell(str(cell)) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that ends no cell of a table and begins no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _shown(found: Estimate) -> str:
    if found.value is None:
        return "n/a"
    interval = f" [{found.low:.3f}, {found.high:.3f}]" if found.low is not None and found.high is not None else ""
    return f"{found.value:.3f}{interval}"


def _listed(names: Iterable[str]) -> str:
    *most, last = map(_cell, names)
    return f"{', '.join(most)} and {last}" if most else last


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
