"""The supported archives, by name: functions `(root, **options) -> Iterator[SourceStudy]`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.errors import ShardError
from shards.files import PACKAGE, package_path
from shards.schema import SourceStudy
from shards.sources.cbis_ddsm.official_split import cbis_ddsm_split
from shards.sources.cbis_ddsm.studies import cbis_ddsm
from shards.sources.cdd_cesm import cdd_cesm
from shards.sources.cmmd import cmmd
from shards.sources.embed.studies import embed
from shards.sources.inbreast import inbreast
from shards.sources.phantom.studies import phantom
from shards.sources.rsna import rsna
from shards.sources.stated_splits import Stated
from shards.sources.table.studies import table
from shards.sources.vindr import vindr, vindr_split

SOURCES: dict[str, Callable[..., Iterator[SourceStudy]]] = {
    "cbis_ddsm": cbis_ddsm,
    "cdd_cesm": cdd_cesm,
    "cmmd": cmmd,
    "embed": embed,
    "inbreast": inbreast,
    "phantom": phantom,
    "rsna": rsna,
    "table": table,
    "vindr": vindr,
}


# The split that an archive comes with: functions of the root, which yield nothing if it lacks the tables of it.
OFFICIAL_SPLITS: dict[str, Callable[[Path], list[Stated]]] = {
    "cbis_ddsm": cbis_ddsm_split,
    "vindr": vindr_split,
}


def resolve_root(root: str) -> Path:
    """The archive folder that `pack.root` names: a path, or `package:NAME` for the folder of an installed package.

    Raises `ShardError` if that package is not installed.
    """
    if not root.startswith(PACKAGE):
        return Path(os.path.expanduser(root))
    name = root.removeprefix(PACKAGE)
    folder = package_path(root) if name.isidentifier() else None
    if folder is None:
        raise ShardError(f"pack.root: the package {name!r} is not installed; run `pip install {name}`")
    return folder
