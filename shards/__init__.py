"""Pack mammography archives into verified tar shards, and read studies back.

`shards.pack` packs, `shards.check` verifies. This module exports what a reader of shards needs, and importing it takes
the standard library, NumPy and OpenCV only.
"""

from shards.errors import ShardError
from shards.read.manifest import Manifest, load_manifest
from shards.read.reader import ShardReader
from shards.schema import Finding, Labels, Study, View

__all__ = ["Finding", "Labels", "Manifest", "ShardError", "ShardReader", "Study", "View", "load_manifest"]
