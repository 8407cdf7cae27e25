"""What every test shares: a quiet, offline environment, and the data that only some machines have."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.register_assert_rewrite("tests.support")

from tests.support.checkout import CHECKOUT  # noqa: E402

# Set before any test module imports torch or transformers; the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="mama-extensions-")
atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)

import torch  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig  # noqa: E402

from mama.runtime import launch  # noqa: E402


def _launch_config(**settings: Any) -> LaunchConfig:
    return LaunchConfig(**{**settings, "start_method": "forkserver"})


if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Fork the ranks of tests from a process that has imported everything once: spawned, each would import for ten
    # seconds. Tests that run the command line in a process of its own spawn them, as users do.
    patch.object(launch, "LaunchConfig", _launch_config).start()
    multiprocessing.set_forkserver_preload(
        [
            *("mama.train.loop", "tests.support.gradients", "tests.support.tiny_run"),
            # What DeepSpeed and transformers import late; the first, by ZeRO's stage 3, brings all of torch.compile.
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
            "transformers.models.gpt2.modeling_gpt2",
        ]
    )

# Set where the data is known to be present: a test that needs it and skips is then a failure.
REQUIRE_CDD_CESM = os.environ.get("MAMA_REQUIRE_CDD_CESM") == "1"


def _cdd_cesm_folder() -> Path:
    return Path(os.environ.get("MAMA_CDD_CESM") or CHECKOUT.parent / "shared" / "data" / "cdd-cesm")


@pytest.fixture(scope="session")
def cdd_cesm_root() -> Path:
    """The folder of the CDD-CESM images; skips where it is absent."""
    folder = _cdd_cesm_folder()
    if not folder.is_dir():
        pytest.skip(f"no CDD-CESM images at {folder}; set MAMA_CDD_CESM to their folder")
    return folder


# Files that take long begin first, the longest in front, so that no process is left alone with one at the end.
LONG = (
    *("test_sweep_on_slurm", "test_slurm_training", "test_slurm_eval", "test_submission", "test_jobs_on_slurm"),
    *("test_loop", "test_resume", "test_slurm_cluster", "test_cdd_cesm", "test_pipeline", "test_ranks", "test_build"),
    *("test_shared_evaluation", "test_local", "test_jobs_command", "test_jobs_slurm", "test_hang", "test_start_check"),
    *("test_hub", "test_bench", "test_checkpoint", "test_agreement", "test_mama_model", "test_validation"),
    *("test_backbones", "test_page", "test_fine_tune", "test_batches", "test_phantom", "test_evaluation"),
    "test_processes",
)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: collections in the tests leave it out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if "cdd_cesm_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cdd_cesm)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if REQUIRE_CDD_CESM and not any(item.get_closest_marker("cdd_cesm") for item in items):
        raise pytest.UsageError("MAMA_REQUIRE_CDD_CESM=1, but none of these tests needs the CDD-CESM images")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if REQUIRE_CDD_CESM and report.skipped and item.get_closest_marker("cdd_cesm"):
        report.outcome = "failed"
        report.longrepr = f"MAMA_REQUIRE_CDD_CESM=1, but this test skipped: {report.longrepr}"
    return report
