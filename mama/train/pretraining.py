"""Pre-training, as the training loop sees it: pairs, the objective, and validation by retrieval."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from mama.data.batches import Batch, training_batches
from mama.data.tokenizer import Tokenizer
from mama.runtime.collectives import rank, world_size
from mama.settings.schema import Config
from mama.train.monitor import Monitor
from mama.train.step_log import GradientNorms, measure_batch, measure_gradient, show_pair
from mama.train.throughput import Meter
from mama.train.training_step import Update, training_step
from mama.train.validation import validate, validation_images
from mama.train.zero_state import DeepSpeedEngine


class Pretraining:
    """The `Method` of `mama train`."""

    def __init__(self, config: Config, engine: DeepSpeedEngine, tokenizer: Tokenizer, frozen: dict[str, str]) -> None:
        self.config, self.engine, self.tokenizer, self.frozen = config, engine, tokenizer, frozen
        self.facts = {"contrastive_batch": config.contrastive_batch(world_size())}
        # ZeRO-3 does not gather, before the first training step, parameters that one module takes from another.
        self.validates_first = config.train.zero_stage != 3
        self.meter = Meter(engine.module, config.data.image_size, engine.device)
        self.norms = GradientNorms(engine, config.optim.clip_norm)
        self.update: Update | None = None
        self.last: Batch | None = None
        if config.train.validate_every:
            validation_images(config)  # fail now, not after hours, if there is no `val` split

    def batches(self, steps: range) -> Generator[Batch]:
        """See `Method`, as for the other methods."""
        return training_batches(self.config, self.tokenizer, steps, rank(), world_size(), self.engine.device)

    def fetch(self, batches: Generator[Batch]) -> Batch:
        return self.meter.fetch(batches)

    def step(self, batches: Sequence[Batch], step: int) -> bool:
        self.norms.clear()
        self.last, self.update = batches[-1], training_step(self.engine, batches, self.config, step)
        return self.update.taken

    def measure(self) -> dict[str, float]:
        assert self.update is not None
        return {
            **measure_batch(self.update, self.config.loss),
            "scale/largest": self.config.loss.max_scale,
            **measure_gradient(self.engine, self.norms),
        }

    def throughput(self) -> dict[str, float]:
        return self.meter.read()

    def show(self, monitor: Monitor, step: int) -> None:
        assert self.update is not None
        assert self.last is not None
        show_pair(monitor, step, self.last, self.update.embeddings, self.tokenizer)

    def validate(self, taken: int) -> tuple[dict[str, float], float]:
        found = validate(self.engine.module, self.config, self.tokenizer, self.engine.device)
        return found, (found["validation/recall_at_5_i2t"] + found["validation/recall_at_5_t2i"]) / 2

    def stops(self, taken: int) -> bool:
        return False
