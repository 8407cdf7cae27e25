"""The whole line as a user types it: DICOM to report, in separate processes, with the verbs of the command line."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import submitit

from mama.quickstart import recipes
from shards.check.check import check
from shards.read.manifest import load_manifest
from tests.support.browser import CHROMIUM, loaded, tensorboard

pytestmark = pytest.mark.ranks

SHARDS = "88e9d2d661b68a8e921c564961e90695db63a3bb5910ed71b9c1fa687a45d5d1"  # SHA-256 of the tars, one after the other
LOSSES = [8.859931, 9.045502, 14.647349, 15.165098, 14.364810, 14.715526, 14.669006, 14.880136]  # of every step
TERMS = ("view", "anchor_text", "partner_text", "local")
SMALL = [
    *("pack.options.patients=24", "pack.long_side=64", "pack.workers=1", "data.image_size=[64,32]"),
    *("train.steps=8", "train.save_every=4", "train.global_batch=16", "train.micro_batch=8", "train.log_every=1"),
    *("vision.config.num_hidden_layers=1", "loss.local_start=2", "eval.bootstrap=20", "eval.heat_maps=2"),
]


def mama(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mama", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every verb of the shipped quickstart recipe was run, made small; training as a job."""
    folder = tmp_path_factory.mktemp("lab")
    settings = [*SMALL, f"pack.key_file={folder}/hash.key"]
    (folder / "hash.key").write_text(64 * "0")
    (folder / "hash.key").chmod(0o600)
    mama("pack", "quickstart", *settings, cwd=folder)
    said = mama("train", "quickstart", *settings, "--slurm", cwd=folder)
    job_id = said.split()[1]
    job: submitit.LocalJob[object] = submitit.LocalJob(folder / "runs" / "quickstart" / "jobs" / job_id, job_id)
    job.wait()
    assert job.state == "FINISHED", job.stderr()
    for verb in ("consolidate", "eval"):
        mama(verb, "quickstart", *settings, cwd=folder)
    mama("report", "runs/quickstart", cwd=folder)  # a run folder names its own configuration
    return folder


def test_every_station_left_its_files(lab: Path) -> None:
    run = lab / "runs" / "quickstart"
    assert check(lab / "runs" / "shards" / "phantom") == []
    assert load_manifest(lab / "runs" / "shards" / "phantom").images == 96
    for name in ("config.yaml", "environment.json", "log.jsonl", "tokenizer", "report.html", "model/heads.safetensors"):
        assert (run / name).exists(), name
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000004", "step-000008"}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == list(range(8))
    for task in ("cancer", "birads", "density"):
        rows = json.loads((run / "eval" / task / "metrics.json").read_text())["rows"]
        shown = {(row["protocol"], row["model"]) for row in rows}
        assert shown == {(p, m) for p in ("zero-shot", "linear probe") for m in ("trained", "untrained")}
    assert "| cancer | zero-shot | image |" in (run / "model" / "README.md").read_text()
    assert not [p for p in (run / "model").rglob("*") if p.is_file() and str(lab).encode() in p.read_bytes()]
    assert "Local alignment" in (run / "report.html").read_text()
    assert not [path for path in (lab / "runs").rglob("*") if path.name.endswith((".partial", ".part"))]


def test_the_shards_have_the_bytes_of_earlier_releases(lab: Path) -> None:
    """An intended change of what shards hold changes them; a build that was begun before it keeps its own bytes."""
    digest = hashlib.sha256()
    for shard in sorted((lab / "runs" / "shards" / "phantom").glob("*.tar")):
        digest.update(shard.read_bytes())
    if cv2.__version__ != "5.0.0":
        pytest.skip(f"OpenCV {cv2.__version__} may encode other JPEGs than 5.0.0, of which the digest is")
    assert digest.hexdigest() == SHARDS


def test_the_loss_is_that_of_earlier_releases(lab: Path) -> None:
    """An intended change of the method changes it. Processors sum in different orders, hence the tolerance."""
    log = [json.loads(line) for line in (lab / "runs" / "quickstart" / "log.jsonl").read_text().splitlines()]
    assert [line["loss/total"] for line in log] == pytest.approx(LOSSES, rel=1e-4)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_tensorboard_shows_every_curve_of_the_run_in_a_browser(lab: Path, tmp_path: Path) -> None:
    run = lab / "runs" / "quickstart"
    logged = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    curves = {name for name in logged if re.search("loss|^pair", name)}  # a page has twelve cards
    assert curves == {*(f"loss/{term}" for term in (*TERMS, "total")), "pairs_per_second"}
    with tensorboard(run) as address:
        # A filter unfolds the groups of what passes it.
        dom = loaded(f"{address}?tagFilter=loss%7C%5Epair%7Calignment#timeseries", tmp_path, len(curves))
    shown = re.findall(r'<tb-truncated-path[^>]* title="([^"]+)"', dom)
    assert sorted(shown) == sorted({*curves, "pair", "alignment"})
    assert len(re.findall(r'<img[^>]* src="data/plugin/timeseries/imageData', dom)) == 2


def test_what_was_seen_in_evaluation_was_not_seen_in_training(lab: Path) -> None:
    shards = load_manifest(lab / "runs" / "shards" / "phantom").shards
    patients = {split: {p for s in shards if s.split == split for p in s.patients} for split in ("train", "test")}
    assert patients["train"]
    assert patients["test"]
    assert not patients["train"] & patients["test"]
    predictions = (lab / "runs" / "quickstart" / "eval" / "cancer" / "predictions.csv").read_text().splitlines()[1:]
    assert {line.split(",")[3] for line in predictions} == patients["test"]


def test_quickstart_keeps_everything_below_its_folder_and_runs_by_seed(tmp_path: Path) -> None:
    samples, cohort = recipes(tmp_path, seed=3)
    assert Path(samples.pack.out).is_relative_to(tmp_path)
    assert cohort.run_folder == tmp_path / "quickstart-3"
    assert cohort.data.shards == [cohort.pack.out]
    assert all(Path(path).is_relative_to(tmp_path) for path in (cohort.pack.root, cohort.pack.out))
    assert cohort.seed == 3
    assert cohort.pack.options["seed"] == 0, "another seed trains anew on the same cohort"
