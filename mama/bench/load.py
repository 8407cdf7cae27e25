"""`mama bench load`: how fast this machine loads shards as training pairs: letterboxed images, tokenised reports."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mama.data import augment, report_text, sample_order
from mama.data import tokenizer as tokens
from mama.data.batches import Collate, training_batches
from mama.data.pairs import Pairs
from mama.data.tokenizer import Tokenizer
from mama.settings.schema import Config, DataConfig, TrainConfig
from shards.pack.plan import Plan
from shards.pack.sample import Sample
from shards.pack.shard_record import Tally, manifest_of
from shards.pack.writer import write_shard
from shards.processes import configure_process
from shards.read.manifest import save_manifest
from shards.schema import DENSITIES, Finding, Labels, Study, View

STORED = (1024, 448)  # (height, width) of a packed image, cropped to the breast
QUALITY = 95
STUDIES, PICTURES = 64, 32
MICRO_BATCH, BATCHES = 36, 4
FINDINGS = (
    Finding(1, "mass", (100, 300, 160, 370), "irregular", "spiculated", "high"),
    Finding(2, "calcification", (120, 600, 150, 640), calcification_type="fine pleomorphic", distribution="grouped"),
)


def bench_load(rounds: int) -> Iterator[str]:
    """Measure `rounds` times and yield a table in Markdown, with medians.

    Times are CPU seconds of this process, with the files in the page cache; only the last line is wall-clock time, with
    a loader process.
    """
    configure_process()
    with tempfile.TemporaryDirectory() as name:
        size = _write_shards(Path(name) / "shards")
        config = Config(
            data=DataConfig([f"{name}/shards"], pairs=["study"], workers=1),  # two images for each pair
            train=TrainConfig(global_batch=MICRO_BATCH, micro_batch=MICRO_BATCH),
        )
        pairs = Pairs(config)
        studies = [pairs.images.study(n) for n in range(STUDIES)]
        sentences = (s for study in studies for view in study.views for s in report_text.report(study, view))
        tokenizer = tokens.learn(sentences, 2048)
        collate = Collate(tokenizer, config.data.max_tokens)
        count = MICRO_BATCH * BATCHES

        def load(turn: int) -> None:
            for start in range(turn * count, (turn + 1) * count, MICRO_BATCH):
                collate([pairs[g] for g in range(start, start + MICRO_BATCH)])

        def write(turn: int) -> None:
            for g in range(turn * count, (turn + 1) * count):
                rng, study = sample_order.generator_at(g, config.seed), studies[g % STUDIES]
                hidden = report_text.draw_hidden(rng, config.data.mask_probability)
                tokenizer.encode(report_text.report(study, study.views[g % 4], hidden), config.data.max_tokens)

        batch = collate([pairs[g] for g in range(MICRO_BATCH)])

        def change(_: int) -> None:
            augment.apply(batch.anchors, batch.anchor_changes)

        yield f"| {STORED[0]:,} x {STORED[1]:,} JPEG of {size / 1e3:.0f} kB to 518 x 518, reports tokenised | |"
        yield "|---|---|"
        yield f"| pairs/s and core | {count / _median(load, rounds):.1f} |"
        yield f"| a report written and tokenised, µs | {_median(write, rounds) / count * 1e6:.0f} |"
        yield f"| a view augmented on the CPU, ms | {_median(change, rounds) / MICRO_BATCH * 1e3:.1f} |"
        yield f"| pairs/s through a loader with one worker | {_through_loader(config, tokenizer, rounds):.1f} |"


def _median(work: Callable[[int], None], rounds: int) -> float:
    """Median CPU seconds of `rounds` turns after a first one; each turn has other samples."""
    seconds = []
    for turn in range(rounds + 1):
        start = time.process_time()
        work(turn)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def _through_loader(config: Config, tokenizer: Tokenizer, rounds: int) -> float:
    """Pairs per second of wall-clock time, without the batches that fill the loader's queue."""
    batches = training_batches(config, tokenizer, range((rounds + 1) * BATCHES), 0, 1)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        seconds.append(time.perf_counter() - start)
    return MICRO_BATCH * BATCHES / statistics.median(seconds[1:])


def _write_shards(folder: Path) -> float:
    """Write a shard with four views of each of `STUDIES` studies; returns the mean size of an image in bytes."""
    folder.mkdir()
    quality = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    pictures = [cv2.imencode(".jpg", _picture(n), quality)[1].tobytes() for n in range(PICTURES)]
    tally = Tally()
    samples = [
        Sample(_study(n), tuple(pictures[(4 * n + view) % PICTURES] for view in range(4)), ()) for n in range(STUDIES)
    ]
    record = tally.record(write_shard(folder, "train-000000.tar", "train", tally.kept(samples)))
    save_manifest(manifest_of(Plan({"source": "benchmark"}, {}, ()), [record]), folder)
    return statistics.mean(map(len, pictures))


def _picture(seed: int) -> NDArray[np.uint8]:
    """Draw a half ellipse with texture at several scales and detector noise [h, w], whose JPEG has a realistic size."""
    rng = np.random.default_rng(seed)
    height, width = STORED
    y, x = np.mgrid[:height, :width].astype(np.float32)
    depth = 1 - np.hypot((y - height / 2) / (0.48 * height), x / (0.95 * width))
    tissue = 120 + 1.7 * rng.normal(size=STORED)
    for cells, contrast in ((8, 40), (32, 25), (128, 8)):
        coarse = rng.normal(size=(cells, cells)).astype(np.float32)
        tissue += contrast * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.where(depth > 0, np.clip(tissue * np.clip(8 * depth, 0, 1), 1, 255), 0).astype(np.uint8)


def _study(number: int) -> Study:
    views = tuple(
        View(
            member=f"{n}.jpg",
            laterality="LR"[n // 2],
            view=("CC", "MLO")[n % 2],
            size=STORED,
            original_size=(3328, 2560),
            pixel_spacing=(0.07, 0.07),
            crop=(0, 0, 1456, 3328),
            flipped=False,
            to_original=(3.25, 0, 0, 0, 3.25, 0),
            labels=Labels(number % 7, DENSITIES[number % 4], number % 2 == 0),
            findings=FINDINGS[: (number + n // 2) % 3],
        )
        for n in range(4)
    )
    facts = {"race": ("White", "Asian")[number % 2], "ethnicity": "Not Hispanic or Latino", "reason": "screening"}
    return Study(f"study{number:04d}", f"patient{number:04d}", "benchmark", "train", views, 40 + number % 45, **facts)
