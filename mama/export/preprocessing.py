"""How a picture for the model is made of an image file: `preprocessing.json` of a model folder.

It has what packing did to the training images (`shards.image.picture`) and the canvas that they were put on, so that
a picture is made of another file in the same way. It names no path, and of the archive only its kind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mama.errors import ConfigError
from mama.run.files import write_json
from mama.run.portable import folder_name
from mama.settings.schema import Config, Fit
from shards.errors import ShardError, one_line
from shards.files import read_json
from shards.from_json import from_json
from shards.image.picture import PictureConfig
from shards.pack.picture_settings import OF_PICTURES, jpeg_quality, packed_with, picture_config
from shards.pack.settings import PackConfig
from shards.read.manifest import Manifest, load_manifest
from shards.read.remote import local_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

PREPROCESSING = "preprocessing.json"
AGAIN = "run `mama consolidate` again"


@dataclass(frozen=True)
class Canvas:
    """What the stored picture is scaled to, see `mama.data.images.to_canvas`: (height, width) in pixels."""

    size: tuple[int, int]
    fit: Fit


@dataclass(frozen=True)
class Source:
    """A folder of training shards: its name, the kind of archive, numbers of its train split, and its settings.

    The manifest lacks those that are `assumed`.
    """

    name: str
    source: str
    patients: int
    studies: int
    images: int
    settings: dict[str, Any]
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """Packing and canvas of a model's images, and the folders of shards that it was trained on.

    `quality` is that of the JPEG that a picture became, None for lossless PNG; `range` are the values of black and
    white that the model is given. With several folders it is the packing of that with most training studies.
    """

    picture: PictureConfig
    quality: int | None
    intent: Literal["presentation", "processing", "both"]
    canvas: Canvas
    range: tuple[float, float]
    sources: tuple[Source, ...]
    versions: dict[str, str]  # of the packages that decoded the images

    def __post_init__(self) -> None:
        if min(self.picture.long_side, *self.canvas.size) < 1:
            raise ValueError("picture.long_side and canvas.size: are not 1 pixel at least")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality: {self.quality} is not in 1..100")
        if not self.sources:
            raise ValueError("sources: names no folder of shards")


def write_preprocessing(config: Config, folder: Path) -> None:
    """Write what the shards and settings of `config` do to an image, from the manifests.

    Raises `ShardError` for a manifest that cannot be read or has no such value; logs in what its folders differ.
    """
    packed = [_packed(address, config) for address in config.data.shards]
    source, pack, manifest = max(packed, key=lambda one: one[0].studies)  # the first of equal ones
    _tell_of_differences(source, [one for one, _, _ in packed])
    made = Preprocessing(
        picture=picture_config(pack),
        quality=jpeg_quality(pack),
        intent=pack.intent,
        canvas=Canvas(config.data.image_size, config.data.fit),
        range=(-1.0, 1.0),
        sources=tuple(one for one, _, _ in packed),
        versions=manifest.versions,
    )
    write_json(folder / PREPROCESSING, asdict(made))


def read_preprocessing(folder: Path) -> Preprocessing:
    """What `write_preprocessing` left in a model folder.

    Raises `ConfigError` if the file is damaged, or missing as an earlier release wrote the model.
    """
    return read_facts(Preprocessing, folder / PREPROCESSING)


def read_facts(made: type[T], path: Path) -> T:
    """The dataclass that a JSON file of a model folder holds. Raises `ConfigError` with the file and what to do."""
    try:
        return from_json(made, read_json(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing, as an earlier release wrote the model; {AGAIN}") from None
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)[:100]
        raise ConfigError(f"{path}: is damaged ({reason}); {AGAIN}") from None


def _packed(address: str, config: Config) -> tuple[Source, PackConfig, Manifest]:
    manifest = load_manifest(local_folder(address, config.data.cache_folder))
    name = folder_name(address)
    try:
        pack, missing = packed_with(manifest.settings)
    except ValueError as error:
        raise ShardError(
            f"{name}: the manifest's settings were edited or damaged ({error}); copy the shards again"
        ) from None
    if missing:
        log.warning("%s: its manifest does not say %s: the defaults are assumed", name, ", ".join(missing))
    train = [shard for shard in manifest.shards if shard.split == "train"]
    source = Source(
        name=name,
        source=manifest.source,
        patients=len({patient for shard in train for patient in shard.patients}),
        studies=sum(shard.samples for shard in train),
        images=sum(sum(shard.view_counts) for shard in train),
        settings={name: getattr(pack, name) for name in OF_PICTURES},
        assumed=tuple(missing),
    )
    return source, pack, manifest


def _tell_of_differences(most: Source, sources: Sequence[Source]) -> None:
    for one in (one for one in sources if one.studies):
        differ = [name for name in OF_PICTURES if one.settings[name] != most.settings[name]]
        if differ:
            told = ", ".join(f"pack.{name}={one.settings[name]}, not {most.settings[name]}" for name in differ)
            log.warning("%s: was packed with %s as %s is, as which pictures are made", one.name, told, most.name)
