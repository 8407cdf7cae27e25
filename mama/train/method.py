"""What the training loop trains, and how: it asks for the parts in which pre-training and fine-tuning differ."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from mama.train.monitor import Monitor
from mama.train.zero_state import DeepSpeedEngine


class Method(Protocol):
    """The steps of a run and their validation: `mama.train.pretraining`, or `mama.finetune.fine_tuning`.

    A batch has the `keys` of its samples and the number of `unreadable` ones that others replace. Every rank must call
    all but `show`.
    """

    engine: DeepSpeedEngine
    frozen: dict[str, str]  # digests of the frozen weights on rank 0
    facts: dict[str, int]  # counts that the marker of a checkpoint holds besides the loop's own
    validates_first: bool  # whether it can be validated before the first step of a start

    def batches(self, steps: range) -> Generator[Any]:
        """This rank's micro-batches for `steps`, in order."""

    def fetch(self, batches: Generator[Any]) -> Any:
        """The next micro-batch, on the device."""

    def step(self, batches: Sequence[Any], step: int) -> bool:
        """Take a step by all micro-batches of this rank; False if a gradient was not finite, and it was skipped."""

    def measure(self) -> dict[str, float]:
        """The values of the last step, to log, except throughput."""

    def throughput(self) -> dict[str, float]:
        """Rates since it was last called."""

    def show(self, monitor: Monitor, step: int) -> None:
        """Log a picture of the last step, on rank 0."""

    def validate(self, taken: int) -> tuple[dict[str, float], float]:
        """Figures to log after `taken` steps, and the score: of two checkpoints the one with the higher is better."""

    def stops(self, taken: int) -> bool:
        """Whether the run is over after `taken` steps, though not all are taken."""
