"""`PackConfig`, the section `pack:` of a recipe. It imports nothing, as the command line and every worker import it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# Of builds that were started before these settings existed.
BEFORE = {"intent": "both", "raw": "stored", "split": "hash", "implants": False}


@dataclass(frozen=True)
class PackConfig:
    """One archive, and how to store its images. `shards.pack.build_settings.validate` checks the values."""

    source: str = ""  # a name in shards.sources.all_sources.SOURCES
    root: str = ""  # the folder of the archive, or package:NAME for data of an installed package
    out: str = ""  # a new folder, or one of an earlier build of the same archive
    options: dict[str, Any] = field(default_factory=dict)  # keywords of the source
    # official, hash, a column of the user's table, or a file with columns patient and split. null: the archive's own
    # split or a column `split` where there is one, else hash
    split: str | None = None
    split_values: dict[str, Any] = field(default_factory=dict)  # word of that column or file: train, val or test
    long_side: int = 1024  # pixels; smaller images are not enlarged
    codec: Literal["jpeg", "png"] = "jpeg"  # png is lossless
    bits: Literal[8, 16] = 8  # 16 with png only
    quality: int = 95  # of the JPEGs
    crop: bool = True  # crop to the breast and blacken the background
    flip: bool = True  # mirror so that the chest wall is on the left
    reduced_jpeg2000: bool = True  # decode JPEG 2000 only at the resolution needed for long_side
    tomosynthesis: Literal["refuse", "slab"] = "refuse"  # slab: the mean of the nine middle frames
    intent: Literal["presentation", "processing", "both"] = "presentation"  # which to keep if a view has both
    raw: Literal["stored", "processed"] = "stored"  # processed: render FOR PROCESSING images (image/for_processing.py)
    samples_per_shard: int = 256  # studies
    workers: int = 0  # processes; 0: one for each core that this process may use
    max_refused: float = 0.05  # fail if a larger share of the images is refused; 1: never
    key_file: str = "~/.config/mama/hash.key"  # secret key of the hashes, created if missing
