"""The logs of a run: TensorBoard and log.jsonl. A resumed run continues both, with one entry for each step."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter, summary

from mama.data.images import inferno
from mama.run.files import read_object
from mama.run.kept_settings import flat
from mama.settings.schema import Config
from shards.files import atomic_write

# The results in TensorBoard's table of runs, beside the settings.
RESULTS = ("loss/total", "validation/clip_loss", "validation/recall_at_1_i2t", "validation/recall_at_1_t2i")
POINT = "point.json"  # in the run folder of a point of a sweep: {"sweep": its name, "differs": {setting: value}}
TILES = 4  # pictures in a row of `show_maps`


class Monitor:
    """Rank 0's logs. Entries of an earlier process from `first_step` on are dropped: those steps are logged again.

    Values of the state after step s, which its checkpoint holds, therefore belong to s, not to s + 1.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self.run = run
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self.first_step = first_step
        self.path = run / "log.jsonl"
        _cut(self.path, first_step)
        self.lines = self.path.open("a", buffering=1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write all values of `step`, and the time in Unix seconds, to disk before returning.

        So a resume leaves no gap, and a reader of log.jsonl sees when the run last took a step.
        """
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        self.lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def hparams(self, config: Config) -> None:
        """Add the settings by dotted name to TensorBoard's table of runs, unless the run is resumed.

        Of a point of a sweep only those that differ between its points, as a table of all would hide them, and without
        a list of columns: TensorBoard takes that of any one run for all, and other points have other axes. Not by
        `SummaryWriter.add_hparams`, which creates a second run for them.
        """
        if self.first_step == 0:
            point = self.run / POINT
            shown = read_object(point)["differs"] if point.exists() else flat(asdict(config))
            settings = {  # the table takes numbers and strings; all else as JSON
                key: value if type(value) in (str, int, float) else json.dumps(value) for key, value in shown.items()
            }
            experiment, start, _ = summary.hparams(settings, dict.fromkeys(RESULTS, 0.0))
            writer: Any = self.board.file_writer
            if not point.exists():
                writer.add_summary(experiment)
            writer.add_summary(start)

    def show_pair(self, step: int, anchor: Tensor, partner: Tensor, text: list[str]) -> None:
        """Show an augmented pair side by side, [1, H, W] in [-1, 1] each, with the anchor's sentences."""
        self.board.add_image("pair", np.concatenate([_grey(anchor), _grey(partner)], axis=1), step, dataformats="HW")
        self.board.add_text("pair", _numbered(text), step)

    def show_maps(self, step: int, image: Tensor, sentences: list[str], cosines: Tensor) -> None:
        """Show where each sentence of a text matches its image [1, H, W] in [-1, 1]: `cosines` [S, P] with its patches.

        They are NaN at patches that were not computed, which are shown like the smallest one.
        The picture holds the image and then one numbered map for each sentence, dark to bright on one scale: from the
        smallest to the largest cosine of all sentences. The text beside it lists the sentences.
        """
        grey = _grey(image)
        patch = (grey.size / cosines.shape[1]) ** 0.5  # side of a patch in pixels: they tile the image
        grids = cosines.detach().float().cpu().numpy().reshape(len(cosines), round(grey.shape[0] / patch), -1)
        low, high = float(np.nanmin(grids)), float(np.nanmax(grids))
        tiles = [np.repeat(grey[..., None], 3, axis=2)]
        for number, grid in enumerate(grids, start=1):
            shares = np.nan_to_num((grid - low) / max(high - low, 1e-6) * 255)
            tiles.append(_map(shares.astype(np.uint8), grey.shape, str(number)))
        lines = [
            f"{s} (cosine {np.nanmin(g):.3f} to {np.nanmax(g):.3f})" for s, g in zip(sentences, grids, strict=True)
        ]
        self.board.add_image("alignment", _mosaic(tiles), step, dataformats="HWC")
        self.board.add_text("alignment", _numbered(lines), step)

    def close(self) -> None:
        """Close both files."""
        self.board.close()
        self.lines.close()


def _cut(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be taken again, and a last line that a crash cut off."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines()
        atomic_write(path, "".join(f"{line}\n" for line in lines if 0 <= _step_of(line) < first_step).encode())


def _step_of(line: str) -> int:
    """The step of a line of the log; -1 if the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _grey(image: Tensor) -> NDArray[np.uint8]:
    """[1, H, W] in [-1, 1] -> uint8 [H, W]."""
    pixels = ((image[0].detach().float() + 1) * 127.5).round().clamp(0, 255)
    return np.asarray(pixels.cpu().numpy(), dtype=np.uint8)


def _map(shares: NDArray[np.uint8], size: tuple[int, ...], label: str) -> NDArray[np.uint8]:
    """Enlarge values of patches [h, w] to a map [H, W, 3] of `size` in false colours, with its label."""
    smooth = cv2.resize(shares, size[::-1], interpolation=cv2.INTER_LINEAR)
    tile = cv2.cvtColor(inferno(np.asarray(smooth, dtype=np.uint8)), cv2.COLOR_BGR2RGB)
    place, scale = (4, size[0] - 4), size[0] / 400
    cv2.putText(tile, label, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return np.asarray(tile, dtype=np.uint8)


def _mosaic(tiles: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Arrange pictures [H, W, 3] of one size, `TILES` to a row."""
    across = min(TILES, len(tiles))
    filled = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    rows = [np.concatenate(filled[i : i + across], axis=1) for i in range(0, len(filled), across)]
    return np.concatenate(rows)


def _numbered(lines: list[str]) -> str:
    """A numbered list in Markdown, which TensorBoard renders."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))
