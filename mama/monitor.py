"""What a run says of itself: TensorBoard and log.jsonl, continued without a fork after a resume."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Rank 0's logs. `first_step` is where this process starts; what lies behind it is rewritten."""

    def __init__(self, run: Path, first_step: int) -> None:
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self.path = run / "log.jsonl"
        _cut(self.path, first_step)
        self.lines = self.path.open("a", buffering=1)
        self.last = time.perf_counter()
        self.last_step = first_step

    def log(self, step: int, values: dict[str, float], global_batch: int) -> None:
        """Write the values of `step`, and the rate since the last call."""
        now = time.perf_counter()
        values = {**values, "pairs_per_second": (step + 1 - self.last_step) * global_batch / (now - self.last)}
        self.last, self.last_step = now, step + 1
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.lines.write(json.dumps({"step": step, **values}) + "\n")

    def show_pair(self, step: int, anchor: Tensor, partner: Tensor, text: str) -> None:
        """One augmented training pair, [1, H, W] in [-1, 1] each, side by side, with its text."""
        picture = np.concatenate([(t.float().cpu().numpy() + 1) / 2 for t in (anchor, partner)], axis=2)
        self.board.add_image("pair", picture, step)
        self.board.add_text("pair", text, step)

    def close(self) -> None:
        self.board.close()
        self.lines.close()


def _cut(path: Path, first_step: int) -> None:
    """Drop the lines of steps that will be taken again, and a line that a crash tore."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    aside = path.with_suffix(".partial")
    aside.write_text("".join(f"{line}\n" for line in kept))
    aside.rename(path)
