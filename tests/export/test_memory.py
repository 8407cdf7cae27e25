"""Memory: consolidating holds a few tensors, and loading holds the model once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mama.settings.load import save
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of

# In a process that has done the same to a tiny model already: what remains is the memory of this model's tensors.
PROGRAM = """
import re, sys
from contextlib import suppress
from pathlib import Path
import torch
from mama.export.consolidate import consolidate
from mama.export.model_folder import load_model
from mama.settings.load import load

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def grown(function):
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    before = kilobytes("VmRSS")
    result = function()
    print((kilobytes("VmHWM") - before) * 1024)
    return result

tiny, large = (load(path) for path in sys.argv[1:])
consolidate(tiny), load_model(tiny.run_folder / "model", torch.device("cpu"))
folder = grown(lambda: consolidate(large))
model = grown(lambda: load_model(folder, torch.device("cpu")))
"""


def test_memory_is_that_of_a_few_tensors_and_loading_holds_the_model_once(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", {"train": 3, "test": 2})
    tiny, large = (config_of(tmp_path, name) for name in ("tiny", "large"))
    shape: dict[str, Any] = large.text.config | {"n_embd": 768, "n_layer": 10, "n_head": 12}
    large = replace(large, text=replace(large.text, config=shape, tune="full"))
    for config in (tiny, large):
        save_run(config)
        save(config, tmp_path / f"{config.name}.yaml")
    paths = [str(tmp_path / f"{config.name}.yaml") for config in (tiny, large)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    consolidating, loading = map(int, done.stdout.split())
    files = large.run_folder / "model" / "text"
    size = sum(path.stat().st_size for path in files.glob("*.safetensors"))
    assert size > 280e6
    assert consolidating < size / 3, "the largest tensor has 9 MB, and 34 MB may wait for being written"
    assert size / 2 < loading < 1.3 * size
