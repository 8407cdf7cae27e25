"""Mammography archives -> verified tar shards, and back to studies.

Packing is in `shards.pack`, verifying in `shards.check`. What is imported here is what a reader of shards needs: the
standard library, NumPy and OpenCV.
"""

from shards.read.manifest import Manifest
from shards.read.reader import ShardReader, load_manifest
from shards.schema import Finding, Labels, ShardError, Study, View

__all__ = ["Finding", "Labels", "Manifest", "ShardError", "ShardReader", "Study", "View", "load_manifest"]
