"""`PackConfig`, the settings of `pack`, apart from it: a worker's start waits for what is imported with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class PackConfig:
    """One archive, and how its images are stored."""

    source: str = ""  # a name in shards.sources.SOURCES
    root: str = ""  # the archive's folder, or package:NAME for one that an installed package brings
    out: str = ""  # a new folder, or that of an earlier build of the same archive
    options: dict[str, Any] = field(default_factory=dict)  # the source's own keywords
    long_side: int = 1024  # pixels; smaller images stay as they are
    codec: Literal["jpeg", "png"] = "jpeg"  # png is lossless
    bits: Literal[8, 16] = 8  # 16 with png only
    quality: int = 95  # of the JPEGs
    crop: bool = True  # cut to the breast and blacken what lies outside of it
    flip: bool = True  # turn the chest wall to the left
    reduced_jpeg2000: bool = True  # decode JPEG 2000 only at the resolution that long_side needs
    tomosynthesis: Literal["refuse", "slab"] = "refuse"  # slab: the mean of a volume's nine middle frames
    intent: Literal["presentation", "processing", "both"] = "presentation"  # kept where a view has both; alone, any is
    raw: Literal["stored", "processed"] = (
        "stored"  # FOR PROCESSING images: as they are, or as pictures (shards/image/for_processing.py)
    )
    samples_per_shard: int = 256  # studies
    workers: int = 0  # processes; 0 is one for each core that this process may use, wherever it runs
    max_refused: float = 0.05  # the share of refused images above which a build fails; 1 never does
    key_file: str = "~/.config/mama/hash.key"  # the secret of the keyed hashes, created if it is not there
