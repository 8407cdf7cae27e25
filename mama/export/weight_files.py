"""A part's tensors on disk: one safetensors file, or several of a largest size with the index of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mama.errors import ConfigError
from mama.run.files import read_object, write_json
from mama.run.tensor_file import Shape, Stored, stored_tensors, write_tensors

AGAIN = "run `mama consolidate` again"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(
    folder: Path, shapes: Mapping[str, Shape], tensor: Callable[[str], Tensor], largest: int | None = None
) -> dict[Path, str]:
    """Write tensors in files of at most `largest` bytes, or one tensor each; returns the SHA-256 of each file."""
    files = _cut(shapes, largest)
    if len(files) == 1:
        return {folder / ONE: write_tensors(folder / ONE, shapes, tensor, {"format": "pt"})}
    written: dict[Path, str] = {}
    places: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        written[path] = write_tensors(path, {name: shapes[name] for name in names}, tensor, {"format": "pt"})
        places |= dict.fromkeys(names, path.name)
    total = sum(shape.bytes for shape in shapes.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return written


def weights_in(folder: Path) -> dict[str, Stored]:
    """The tensors in the safetensors files of a part, or of a model of transformers; {} if it has none.

    Raises `ConfigError` if a file is damaged, or missing from those that the index names.
    """
    if (folder / INDEX).is_file():
        names = read_object(folder / INDEX).get("weight_map")
        if not isinstance(names, dict):
            raise ConfigError(f"{folder / INDEX}: has no weight_map; restore it from a copy")
        files = [folder / name for name in sorted({Path(str(name)).name for name in names.values()})]
    else:
        files = [folder / ONE] if (folder / ONE).is_file() else []
    return {name: stored for path in files for name, stored in stored_tensors(path).items()}


def fill(
    module: nn.Module,
    names: Mapping[str, str],
    stored: Mapping[str, Stored],
    place: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Read tensors into a module, one at a time, as `dtype` or as they are stored.

    `names` are theirs in the module by those in the files at `place`. Raises `ConfigError` if the files hold other
    tensors, or of another shape.
    """
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    if different := sorted(names.keys() ^ stored.keys()):
        raise ConfigError(f"{place}: {different[0]} is missing or left over; {AGAIN}")
    for name, source in stored.items():
        tensor = own[names[name]]
        if tuple(tensor.shape) != source.shape:
            raise ConfigError(f"{place}: {name} is {list(source.shape)}, not {list(tensor.shape)}; {AGAIN}")
        if tensor.dtype == source.dtype == (dtype or source.dtype):
            source.read_into(tensor)
        elif tensor.numel():
            tensor.data = source.read().to(dtype or source.dtype)


def _cut(shapes: Mapping[str, Shape], largest: int | None) -> list[list[str]]:
    files: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if files[-1] and largest is not None and size + shape.bytes > largest:
            files.append([])
            size = 0
        files[-1].append(name)
        size += shape.bytes
    return files
