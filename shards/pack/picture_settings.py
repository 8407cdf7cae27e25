"""How a build makes its pictures: by the settings of `mama pack`, or by those that its manifest recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.from_json import from_json
from shards.image.picture import PictureConfig
from shards.pack.settings import BEFORE, PackConfig

# Those that decide the pixels and the choice of images. No other setting of a manifest says how to make them again, and
# root, key and options speak of the archive.
OF_PICTURES = (
    *("long_side", "codec", "bits", "quality", "crop", "flip", "reduced_jpeg2000", "tomosynthesis"),
    *("intent", "raw"),
)


def picture_config(config: PackConfig) -> PictureConfig:
    """How each picture is made."""
    slab, processed = config.tomosynthesis == "slab", config.raw == "processed"
    return PictureConfig(
        config.long_side, config.bits, config.crop, config.flip, config.reduced_jpeg2000, slab, processed
    )


def jpeg_quality(config: PackConfig) -> int | None:
    """The quality of the JPEGs; None for lossless PNG."""
    return config.quality if config.codec == "jpeg" else None


def packed_with(settings: Mapping[str, Any]) -> tuple[PackConfig, list[str]]:
    """`OF_PICTURES` as the settings of a manifest have them, and the names of those that it lacks.

    These have the value of before the setting existed, or else the default. Raises `ValueError` for one that is none.
    """
    before = {name: value for name, value in BEFORE.items() if name in OF_PICTURES}
    recorded = {name: settings[name] for name in OF_PICTURES if name in settings}
    missing = [name for name in OF_PICTURES if name not in {**before, **recorded}]
    return from_json(PackConfig, {**before, **recorded}), missing
