"""Throughput: pairs and tokens per second, time spent waiting for data, peak memory, and MFU."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import torch

from mama.data.batches import Batch
from mama.model.flops import pair_flops, peak_flops
from mama.model.mama_model import MamaModel
from mama.runtime.collectives import world_size


class Meter:
    """Counts what this rank fetches, and how long it waits for it, between two readings."""

    def __init__(self, model: MamaModel, image_size: tuple[int, int], device: torch.device) -> None:
        self.model, self.image_size, self.device = model, image_size, device
        self.peak = peak_flops(device)
        self._restart()

    def _restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.pairs = 0
        self.texts: list[int] = []  # tokens of each
        self.alone: list[int] = []  # of each sentence that is read by itself

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch, moved to the device."""
        started = time.perf_counter()
        batch = next(batches)
        self.pairs += len(batch.keys)
        self.texts += batch.texts.lengths
        if self.model.reads_alone:
            self.alone += batch.texts.sentences.lengths
        moved = batch.to(self.device)
        self.waited += time.perf_counter() - started
        return moved

    def read(self) -> dict[str, float]:
        """Return rates since the last reading, of pairs and text tokens (without padding) on all ranks; peak memory.

        Every rank has as many pairs; as many tokens as this one is assumed. `mfu` is the share of the GPU's dense bf16
        peak that the model's own operations take (`mama.model.flops`), if that peak is known. With
        `vision.tokens` tissue also the share of patches that hold any, in the latest images.
        """
        seconds = max(time.perf_counter() - self.started, 1e-9)
        lengths = self.model.vision.lengths
        values = {
            "pairs_per_second": self.pairs * world_size() / seconds,
            "tokens_per_second": (sum(self.texts) + sum(self.alone)) * world_size() / seconds,
            "data_wait_share": self.waited / seconds,
            "memory_gb": peak_memory_gb(self.device),
        }
        if lengths:
            values["tissue_share"] = tissue_share(self.model, self.image_size)
        if self.peak and self.pairs:
            each = len(self.texts) / self.pairs
            work = pair_flops(self.model, self.image_size, self.texts, images=lengths, each=each, alone=self.alone)
            values["mfu"] = work * self.pairs / seconds / self.peak
        self._restart()
        return values


def tissue_share(model: MamaModel, image_size: tuple[int, int]) -> float:
    """Return the share of the patches of `image_size` (H, W) that were encoded, in the latest images of the tower."""
    lengths = model.vision.lengths
    return (sum(lengths) / len(lengths) - model.vision.prefix) / model.vision.patches_of(image_size)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak of this process in GiB: of PyTorch's tensors on a GPU, else of its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
