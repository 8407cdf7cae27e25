"""Local alignment maps: the cosine of a sentence about a lesion with each patch of an image.

Three kinds of maps come from one pass over the images. The map of a target is that of the very sentence that names its
finding (`mama.evaluate.pointing`); those of its controls are of other sentences in its place
(`mama.evaluate.controls`). The map of any kind (`mama.evaluate.any_kind`) is the same in every image, with lesions and
without (`mama.evaluate.detection`).

Letters: t targets, c controls, n images, K kinds of lesions, S sentences, P = gh x gw patches of an image, D shared
width.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mama.data import report_text
from mama.data.augment import normalise
from mama.data.batches import tokenise
from mama.data.held_out import CollateRows, Split
from mama.data.loader import load, to_device
from mama.data.tokenizer import Tokenizer
from mama.evaluate import any_kind, controls, detection, local_retrieval, pointing
from mama.evaluate.any_kind import AnyKind, Sentence, sentence_about
from mama.evaluate.arrays import Float32s
from mama.evaluate.boxes import Lesion, lesions
from mama.evaluate.controls import Controls
from mama.evaluate.detection import Marks
from mama.evaluate.local_retrieval import Asked
from mama.evaluate.pointing import Target
from mama.model.mama_model import MamaModel
from mama.runtime.sharing import over_ranks
from mama.settings.schema import Config, LossConfig, Style
from shards.progress import progress
from shards.schema import Finding, View


@dataclass(frozen=True)
class Search:
    """What is looked for, and in which images `rows` of the split. The default is nothing, in none."""

    targets: list[Target] = field(default_factory=list)  # in the order of their images
    rows: list[int] = field(default_factory=list)
    complete: dict[int, tuple[Lesion, ...]] = field(default_factory=dict)  # row of which all boxes are known -> them
    any_kind: AnyKind | None = None
    controls: Controls = field(default_factory=Controls)  # of the targets
    asked: Asked = field(default_factory=Asked)  # of the targets' images and lesion-free ones


@dataclass(frozen=True)
class Maps:
    """The maps of a model, NaN where it computed no patch (`MamaModel.patch_embeddings`).

    On ranks other than the first they are those of this rank's share.
    """

    own: Float32s  # [t, gh, gw], of the sentence of each target
    any_kind: Float32s  # [n, gh, gw], for each of `Search.rows`; 0 without `Search.any_kind`
    grey: Float32s  # [n, gh, gw], mean grey values of the patches
    controls: Float32s  # [c, gh, gw], of those of `Search.controls`
    scores: Float32s  # [n, S], of each sentence of `Search.asked` in each of `Search.rows`


def search(split: Split, tokenizer: Tokenizer, max_tokens: int, loss: LossConfig) -> Search:
    """All targets, and if there are boxes all images of which `detection.is_complete`.

    Without boxes, as of radiologists' reports alone, only the images of targets and lesion-free ones are read. `loss`
    is that of training.
    """

    def fits(text: list[str] | tuple[str, ...], number: int) -> bool:
        return _fits(text, number, tokenizer, max_tokens)

    targets = find_targets(split, tokenizer, max_tokens)
    asked = local_retrieval.ask(targets, split.items, split.style, fits, loss)
    read = {target.row for target in targets} | set(asked.lesion_free)
    complete = complete_images(split)
    others = controls.find(targets, split.style, fits)
    told = [finding for row in complete for finding in split.items[row].view.findings]
    sentences = any_kind.find(told, split.style, lambda one: fits(*one))
    if not sentences:
        return Search(targets, sorted(read), controls=others, asked=asked)
    return Search(targets, sorted(read | complete.keys()), complete, sentences, others, asked)


def complete_images(split: Split) -> dict[int, tuple[Lesion, ...]]:
    """The rows of which all boxes are known (`detection.is_complete`), with their lesions."""
    return {
        row: lesions(item.view, item.view.findings, split.size, split.images.fit)
        for row, item in enumerate(split.items)
        if detection.is_complete(item.view)
    }


def find_targets(split: Split, tokenizer: Tokenizer, max_tokens: int) -> list[Target]:
    """Every sentence about a finding, in the split's images that show a lesion.

    Findings of an image in the same words share one sentence with several boxes. Sentences of a radiologist's report
    are not linked to boxes: the first one gets all boxes of the image. Sentences beyond `max_tokens` are left out.
    """
    targets = []
    for row, item in enumerate(split.items):
        text = report_text.text(item.study, item.view, split.style, frozenset(report_text.META))
        named = report_text.finding_sentences(item.view, split.style, text)
        for sentence, findings in _sentences(item.view, named).items():
            if _fits(text, text.index(sentence), tokenizer, max_tokens):
                found = lesions(item.view, findings, split.size, split.images.fit)
                targets.append(Target(row, item, text, text.index(sentence), found))
    return targets


def _fits(text: Sequence[str], number: int, tokenizer: Tokenizer, max_tokens: int) -> bool:
    """Whether a sentence, with what its text says before it, fits into `max_tokens`."""
    return len(tokenizer.encode(list(text[: number + 1]), sys.maxsize).tokens) <= max_tokens


def _sentences(view: View, named: list[str]) -> dict[str, list[Finding]]:
    """The sentences that name a lesion and the findings of each; `named` are those of the findings, in order."""
    found: dict[str, list[Finding]] = {}
    if report_text.own_words(view):
        positive = view.findings or view.labels.cancer or view.labels.pathology in ("benign", "malignant")
        return {sentence: list(view.findings) for sentence in named[: bool(positive)]}
    for finding, sentence in zip(view.findings, named, strict=False):
        found.setdefault(sentence, []).append(finding)
    return found


def asked_sentence(words: str, style: Style) -> Sentence:
    """A text that states nothing but a mass, with the `words` of a user in the place of the sentence that names it."""
    text, number = sentence_about((Finding(1, "mass"),), style)
    return (*text[:number], words, *text[number + 1 :]), number


@torch.inference_mode()
def maps(
    model: MamaModel, tokenizer: Tokenizer, split: Split, sought: Search, config: Config, device: torch.device
) -> Maps:
    """The maps of all that is `sought`, in the order of its targets and rows. Every rank must call it."""
    grid = patch_grid(model, split.size)
    own_of_row: dict[int, list[Sentence]] = defaultdict(list)
    for target in sought.targets:
        own_of_row[target.row].append((tuple(target.text), target.sentence))
    controls_of_row: dict[int, list[Sentence]] = defaultdict(list)
    for control in sought.controls.made:
        controls_of_row[sought.targets[control.target].row].append((control.text, control.sentence))

    def vectors(sentences: list[Sentence]) -> Tensor:  # [s, D]
        return sentence_vectors(model, tokenizer, sentences, config.data.max_tokens, device)

    def own_cosines(asked: list[tuple[int, Tensor]], patches: Tensor) -> Float32s:
        """Of sentences [D], each with the patches of the image in this place of the batch."""
        if not asked:
            return np.zeros((0, *grid), np.float32)
        places, sentences = zip(*asked, strict=True)
        return on_grid(torch.einsum("td,tpd->tp", torch.stack(sentences), patches[list(places)]), grid)

    def cosines(batches: list[range]) -> Iterator[tuple[Float32s, ...]]:
        lesions = vectors([*sought.any_kind.lesions, sought.any_kind.normal]) if sought.any_kind else None
        of_targets = [*chain(*own_of_row.values()), *chain(*controls_of_row.values())]
        known = _vectors_of([*of_targets, *sought.asked.sentences], vectors, config.eval.batch)
        scored = [known[one] for one in sought.asked.sentences]
        rows = [[sought.rows[place] for place in batch] for batch in batches]
        for pixels, own in zip(_pixels(split, rows, config, device), rows, strict=True):
            patches = patch_vectors(model, pixels, device)
            of_own, of_controls = (
                own_cosines([(place, known[one]) for place, row in enumerate(own) for one in of_row[row]], patches)
                for of_row in (own_of_row, controls_of_row)
            )
            of_any = patches.new_zeros(patches.shape[:2])
            if lesions is not None:
                of_any = any_kind.difference(cosines_with(lesions, patches))
            grey = np.stack([patch_means(image, grid) for image in pixels[:, 0].numpy()])
            scores = local_retrieval.scores(scored, patches, sought.asked.temperature)
            yield of_own, on_grid(of_any, grid), grey, of_controls, scores

    nothing, unscored = np.zeros((0, *grid), np.float32), np.zeros((0, len(sought.asked.sentences)), np.float32)
    found = [(*(nothing,) * 4, unscored), *over_ranks(len(sought.rows), config.eval.batch, cosines)]
    return Maps(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _vectors_of(
    sentences: list[Sentence], vectors: Callable[[list[Sentence]], Tensor], size: int
) -> dict[Sentence, Tensor]:
    """Of each distinct sentence, computed `size` at a time: they are few, as many images have the same ones."""
    distinct = list(dict.fromkeys(sentences))
    pieces = [distinct[start : start + size] for start in range(0, len(distinct), size)]
    return {sentence: one for piece in pieces for sentence, one in zip(piece, vectors(piece), strict=True)}


def _pixels(split: Split, rows: list[list[int]], config: Config, device: torch.device) -> Iterator[Tensor]:
    """uint8 [b, 1, H, W] of each list of `rows`, all of `eval.batch` images but the last."""
    collate = CollateRows(None, config.data.max_tokens)
    options: dict[str, Any] = {"batch_size": config.eval.batch, "generator": torch.Generator()}
    options["sampler"] = [row for batch in rows for row in batch]
    with closing(load(split, config, collate, device, **options)) as batches:
        for pixels, _, _ in progress(batches, len(rows), "local alignment", "batches"):
            yield pixels


def patch_grid(model: MamaModel, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns (gh, gw) of the patches of a canvas (H, W)."""
    patch = int(model.vision.backbone.config.patch_size)
    return size[0] // patch, size[1] // patch


def sentence_vectors(
    model: MamaModel, tokenizer: Tokenizer, sentences: list[Sentence], max_tokens: int, device: torch.device
) -> Tensor:
    """Unit embeddings [s, D] of sentences, each as its text has it, or by itself (`text.sentences`).

    A text is embedded once, however many are of it.
    """
    if model.reads_alone:
        sentences = [((text[number],), 0) for text, number in sentences]
    distinct = list(dict.fromkeys(text for text, _ in sentences))
    texts = tokenise(tokenizer, [list(text) for text in distinct], max_tokens)
    embedded = model.sentence_embeddings(texts.to(device))
    return embedded[[distinct.index(text) for text, _ in sentences], [number for _, number in sentences]]


def patch_vectors(model: MamaModel, pixels: Tensor, device: torch.device) -> Tensor:
    """Unit embeddings [b, P, D] of the patches of uint8 [b, 1, H, W]; NaN where none was computed."""
    return model.patch_embeddings(normalise(to_device(pixels, device)).to(next(model.parameters()).dtype))


def cosines_with(sentences: Tensor, patches: Tensor) -> Tensor:
    """Cosines [b, s, P] of sentences [s, D] with patches [b, P, D], all of unit length."""
    return torch.einsum("sd,bpd->bsp", sentences, patches)


def on_grid(values: Tensor, grid: tuple[int, int]) -> Float32s:
    """Maps [..., gh, gw] of values [..., P]."""
    found: Float32s = values.float().cpu().numpy().reshape(*values.shape[:-1], *grid)
    return found


def patch_means(pixels: NDArray[np.uint8], grid: tuple[int, int]) -> Float32s:
    """Mean grey value of each patch, [gh, gw], of an image [H, W]."""
    tall, wide = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    cut = pixels[: grid[0] * tall, : grid[1] * wide].astype(np.float32)
    return cut.reshape(grid[0], tall, grid[1], wide).mean((1, 3))


def document(
    found: dict[str, Maps], sought: Search, split: Split, files: dict[str, list[Marks]], config: Config
) -> dict[str, Any]:
    """Pointing game and box AUC of the targets, and `detection` in all images, by the maps `found` of each model.

    `files` are the boxes of detectors in each image of the split; without the maps of any kind they stand alone.
    """
    grey = next(iter(found.values())).grey
    place = {row: number for number, row in enumerate(sought.rows)}
    of_targets = grey[[place[target.row] for target in sought.targets]]
    pointed = pointing.document(
        {name: m.own for name, m in found.items()}, of_targets, sought.targets, split.size, config
    )
    if pointed["rows"] and "trained" in found:
        trained = found["trained"]
        pointed["controls"] = controls.document(
            trained.own, trained.controls, sought.controls, of_targets, sought.targets, split.size, config
        )
    searched, boxes = sought.complete, {}
    if searched:
        rows = [place[row] for row in searched]
        maps = {name: m.any_kind[rows] for name, m in found.items()}
        boxes = detection.boxes_of_maps(maps, grey[rows], split.size, config.seed)
    elif files:
        searched = complete_images(split)
    boxes |= {name: [of_rows[row] for row in searched] for name, of_rows in files.items()}
    patients = [split.items[row].study.patient for row in searched]
    detected = detection.document(boxes, detection.Searched(patients, list(searched.values())), config)
    left_out = len(split.items) - len(searched) if searched else 0
    origin = {"left_out": left_out, **any_kind.document(sought.any_kind), "files": list(files)}
    return pointed | {"detection": detected | origin}


def examples(targets: list[Target], count: int) -> list[int]:
    """Indices of the first `count` targets in shard order that show cancer, one per patient, whatever the result."""
    chosen: dict[str, int] = {}
    for i, target in enumerate(targets):
        labels = target.item.view.labels
        if labels.cancer or labels.pathology == "malignant":
            chosen.setdefault(target.item.study.patient, i)
    return list(chosen.values())[:count]
