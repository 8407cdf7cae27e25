"""What a run says of itself: TensorBoard and log.jsonl, continued without a fork after a resume."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from mama.data.batches import Batch, Texts
from mama.data.colour_map import inferno
from mama.data.tokenizer import Tokenizer
from mama.model.flops import pair_flops, peak_flops
from mama.model.mama_model import MamaModel
from mama.runtime.collectives import world_size
from mama.settings.schema import Config
from shards.files import atomic_write

# The columns of TensorBoard's table of settings that are results.
RESULTS = ("loss/total", "validation/clip_loss", "validation/recall_at_1_i2t", "validation/recall_at_1_t2i")
TILES = 4  # pictures in a row of `show_maps`


class Monitor:
    """Rank 0's logs. `first_step` is where this process starts; what lies behind it is rewritten.

    So whatever belongs to the state that a checkpoint after step s holds is logged at s, not at s + 1.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self.first_step = first_step
        self.path = run / "log.jsonl"
        _cut(self.path, first_step)
        self.lines = self.path.open("a", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write all values of `step`; they are on disk when this returns, lest a resume leave a gap."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        self.lines.write(json.dumps({"step": step, **values}) + "\n")

    def hparams(self, config: Config) -> None:
        """All settings, by dotted name, for TensorBoard's table of runs; a resumed run has them already.

        `SummaryWriter.add_hparams` would make a second run out of them.
        """
        if self.first_step == 0:
            experiment, start, _ = summary.hparams(_flat(asdict(config)), dict.fromkeys(RESULTS, 0.0))
            writer: Any = self.board.file_writer
            writer.add_summary(experiment)
            writer.add_summary(start)

    def show_pair(self, step: int, anchor: Tensor, partner: Tensor, text: list[str]) -> None:
        """One augmented training pair, [1, H, W] in [-1, 1] each, side by side, with the anchor's sentences."""
        self.board.add_image("pair", np.concatenate([_grey(anchor), _grey(partner)], axis=1), step, dataformats="HW")
        self.board.add_text("pair", _numbered(text), step)

    def show_maps(self, step: int, image: Tensor, sentences: list[str], maps: Tensor) -> None:
        """Where each sentence of an image's text points: `image` [1, H, W] in [-1, 1], and the cosines `maps` [S, P].

        The picture shows the image and then the sentences' maps, numbered, dark to bright from the smallest
        to the largest cosine of all of them; the text says what the numbers stand for.
        """
        grey = _grey(image)
        patch = (grey.size / maps.shape[1]) ** 0.5  # side of a patch in pixels: they tile the image
        grids = maps.detach().float().cpu().numpy().reshape(len(maps), round(grey.shape[0] / patch), -1)
        low, high = float(grids.min()), float(grids.max())
        tiles = [np.repeat(grey[..., None], 3, axis=2)]
        for number, grid in enumerate(grids, start=1):
            shares = (grid - low) / max(high - low, 1e-6) * 255
            smooth = cv2.resize(shares.astype(np.uint8), grey.shape[::-1], interpolation=cv2.INTER_LINEAR)
            tile = cv2.cvtColor(inferno(np.asarray(smooth, dtype=np.uint8)), cv2.COLOR_BGR2RGB)
            place, size = (4, grey.shape[0] - 4), grey.shape[0] / 400
            cv2.putText(tile, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, size, (255, 255, 255), 1, cv2.LINE_AA)
            tiles.append(np.asarray(tile, dtype=np.uint8))
        said = [f"{s} (cosine {g.min():.3f} to {g.max():.3f})" for s, g in zip(sentences, grids, strict=True)]
        self.board.add_image("alignment", _mosaic(tiles), step, dataformats="HWC")
        self.board.add_text("alignment", _numbered(said), step)

    def close(self) -> None:
        self.board.close()
        self.lines.close()


class Meter:
    """How fast this rank works: what it fetched, and how long it waited for it, since the last reading."""

    def __init__(self, model: MamaModel, image_size: tuple[int, int], device: torch.device) -> None:
        self.model, self.image_size, self.device = model, image_size, device
        self.peak = peak_flops(device)
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.pairs = self.texts = self.tokens = 0

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next micro-batch, on the device."""
        asked = time.perf_counter()
        batch = next(batches)
        self.pairs += len(batch.keys)
        self.texts += len(batch.texts.tokens)
        self.tokens += int(batch.texts.mask.sum())
        moved = batch.to(self.device)
        self.waited += time.perf_counter() - asked
        return moved

    def read(self) -> dict[str, float]:
        """Rates since the last call, in pairs and text tokens (no padding) of all ranks; and the peak of memory.

        Every rank has as many pairs; tokens are taken to be as many as on this one. `mfu` is the share of
        the GPU's dense bf16 peak that the model's own operations make up (`mama.model.flops`), where that is known.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        values = {
            "pairs_per_second": self.pairs * world_size() / seconds,
            "tokens_per_second": self.tokens * world_size() / seconds,
            "data_wait_share": self.waited / seconds,
            "memory_gb": _peak_memory_gb(self.device),
        }
        if self.peak and self.pairs:
            length, texts = self.tokens / self.texts, self.texts / self.pairs
            work = pair_flops(self.model, self.image_size, length, texts=texts)
            values["mfu"] = work * self.pairs / seconds / self.peak
        self._restart()
        return values


def sentences_of(texts: Texts, row: int, tokenizer: Tokenizer) -> list[str]:
    """The sentences of one text as the model reads them: cut where it was cut."""
    ends = texts.separators[row][texts.sentence_mask[row]].tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    tokens = texts.tokens[row].tolist()
    return [str(tokenizer.base.decode(tokens[a:b])).strip() for a, b in zip(starts, ends, strict=True)]


def _peak_memory_gb(device: torch.device) -> float:
    """Of this process: on the GPU what PyTorch held at most, elsewhere the largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _cut(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be taken again, and a line that a crash tore."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        atomic_write(path, "".join(f"{line}\n" for line in lines if 0 <= _step_of(line) < first_step).encode())


def _step_of(line: str) -> int:
    """The step of a line of the log, or -1 where it is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Dotted names, and values that TensorBoard's table takes: numbers are numbers, all else is written out."""
    flat: dict[str, float | str] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[prefix + name] = value if is_number or isinstance(value, str) else json.dumps(value)
    return flat


def _grey(image: Tensor) -> NDArray[np.uint8]:
    """[1, H, W] in [-1, 1] -> uint8 [H, W]."""
    pixels = ((image[0].detach().float() + 1) * 127.5).round().clamp(0, 255)
    return np.asarray(pixels.cpu().numpy(), dtype=np.uint8)


def _mosaic(tiles: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures [H, W, 3] of one size, `TILES` to a row."""
    across = min(TILES, len(tiles))
    filled = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    rows = [np.concatenate(filled[i : i + across], axis=1) for i in range(0, len(filled), across)]
    return np.concatenate(rows)


def _numbered(lines: list[str]) -> str:
    """As TensorBoard renders it, in Markdown."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
