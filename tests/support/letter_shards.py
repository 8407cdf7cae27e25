"""Shards of studies written as letters, one a view: `L` and `R` are CC views, `l` and `r` MLO views."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mama.data.batches import Collate
from mama.data.pairs import Pair, Pairs
from mama.settings.schema import Config, DataConfig, TrainConfig
from shards.pack.sample import Sample
from shards.schema import Labels, Study, View
from tests.support.shard_folder import write_folder
from tests.support.word_tokenizer import tokenizer

STORED = (24, 16)  # (height, width) of every image
# Of each split, the views of its studies.
STUDIES = {"val": ["LR"], "train": ["LlRr", "L", "LR", "LlR", "R"], "test": ["Rr", "Ll"]}
GLOBAL_BATCH = 12
BIRADS = {"L": 2, "R": 4}


def view_of(n: int, letter: str) -> View:
    side = letter.upper()
    return View(
        member=f"{n}.jpg",
        laterality=side,
        view="CC" if letter == side else "MLO",
        size=STORED,
        original_size=STORED,
        pixel_spacing=None,
        crop=(0, 0, STORED[1], STORED[0]),
        flipped=False,
        to_original=(1, 0, 0, 0, 1, 0),
        labels=Labels(BIRADS[side], "B"),
    )


def study_of(letters: str, key: str = "study", split: str = "train") -> Study:
    views = tuple(view_of(n, letter) for n, letter in enumerate(letters))
    return Study(key, f"patient-{key}", "invented", split, views, age=40 + len(views))


def write(folder: Path, studies: dict[str, list[str]], first_grey: int = 30) -> Path:
    """Shards in which every image has a grey of its own."""
    grey = iter(range(first_grey, 256, 8))

    def sample(letters: str, name: str, split: str) -> Sample:
        images = [cv2.imencode(".jpg", np.full(STORED, next(grey), np.uint8))[1].tobytes() for _ in letters]
        return Sample(study_of(letters, name, split), tuple(images), ())

    samples = {
        split: [sample(letters, f"{split}{number}", split) for number, letters in enumerate(all_letters)]
        for split, all_letters in studies.items()
    }
    write_folder(folder, samples, per_shard=2)
    return folder


def config_of(*folders: Path, micro: int = GLOBAL_BATCH, **data: Any) -> Config:
    settings = {"image_size": (32, 16), "workers": 0, **data}
    return Config(
        seed=1,
        data=DataConfig(shards=[str(f) for f in folders], **settings),
        train=TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=micro),
    )


def content(pair: Pair) -> tuple[Any, ...]:
    arrays = (pair.anchor, pair.partner, pair.anchor_change, pair.partner_change)
    return pair.key, *(a.tobytes() for a in arrays), tuple(pair.anchor_sentences), tuple(pair.partner_sentences)


def fingerprint(folder: str) -> str:
    """All of some pairs and of their text ids, as one hash; also called in a process of its own."""
    pairs = Pairs(config_of(Path(folder), mask_probability=0.5))
    some = [pairs[g] for g in range(20)]
    ids = Collate(tokenizer(), 144)(some).text_ids.tolist()
    return hashlib.sha256(repr(([content(pair) for pair in some], ids)).encode()).hexdigest()
