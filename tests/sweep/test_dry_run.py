"""What `mama sweep --dry-run` says, without a Slurm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mama.errors import ConfigError
from mama.settings.schema import EvalConfig
from mama.sweep.dry_run import dry_run
from mama.sweep.resources import cluster_of, require_ranks
from mama.sweep.sweep import Evaluation, Point, Sweep
from tests.support.tiny_run import config_of

PROFILE = "cluster: slurm\npartition: gpu\nnodes: 2\ntasks_per_node: 2\ngpus_per_node: 2\ntimeout_min: 90\n"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "gpu.yaml").write_text(PROFILE)
    (tmp_path / "cpu.yaml").write_text("cluster: slurm\ntimeout_min: 60\n")
    points = []
    for seed in range(3):
        config = replace(config_of(tmp_path, f"seed-{seed}"), runs=str(tmp_path / "runs" / "study"), seed=seed)
        points.append(Point(config, {"seed": seed}))
    profiles = {"default": str(tmp_path / "cpu.yaml"), "train": str(tmp_path / "gpu.yaml")}
    stages = ["train", "consolidate", "eval"]
    return Sweep("study", tmp_path / "runs" / "study", points, stages, [Evaluation("eval")], profiles, at_once=2)


def test_it_shows_points_scripts_jobs_and_gpu_hours_and_writes_nothing(sweep: Sweep) -> None:
    lines = list(dry_run(sweep, retry=False))
    assert lines[-1] == "9 jobs in 3 arrays, at most 18.0 GPU-hours; nothing was submitted"  # 3 x 4 GPUs x 1.5 h
    text = "\n".join(lines)
    assert [line.split() for line in lines[1:4]] == [[f"seed-{seed}", str(seed)] for seed in range(3)]
    assert lines[5] == "eval: cancer, birads, density by zeroshot, probe, with 100 % of the labels"
    assert text.count("#SBATCH --array=0-2%2\n") == 3
    assert text.count("--dependency=aftercorr:TRAIN\n") == text.count("--dependency=aftercorr:CONSOLIDATE\n") == 1
    assert text.count("--kill-on-invalid-dep=yes\n") == 2
    assert f"export PYTHONPATH={sweep.own}/code/" in text
    assert not sweep.folder.exists()


def test_gpus_that_are_asked_for_otherwise_are_not_counted_as_none(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(PROFILE.replace("gpus_per_node: 2", "additional: {gres: 'gpu:2'}"))
    assert "GPU-hours unknown" in list(dry_run(sweep, retry=False))[-1]


def test_ranks_that_cannot_share_the_batch_are_refused(sweep: Sweep, tmp_path: Path) -> None:
    require_ranks(sweep)
    (tmp_path / "gpu.yaml").write_text(PROFILE.replace("tasks_per_node: 2", "tasks_per_node: 3"))
    with pytest.raises(ConfigError, match=r"seed-0: train\.global_batch: 8 is not a multiple of micro_batch x ranks"):
        require_ranks(sweep)


def test_stages_here_and_on_a_cluster_do_not_mix(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="all stages run on one cluster, or all on this machine"):
        cluster_of(replace(sweep, profiles={**sweep.profiles, "eval": "local"}))


def test_it_counts_the_fine_tunings_and_refuses_a_batch_that_the_ranks_cannot_share(sweep: Sweep) -> None:
    measured = EvalConfig(protocols=["probe", "finetune"], fractions=[0.01, 1.0], draws=2, protocol="paper")
    points = [Point(replace(point.config, eval=measured), point.differs) for point in sweep.points]
    found = replace(sweep, points=points)
    require_ranks(found)
    assert [line for line in dry_run(found, retry=False) if line.startswith("eval:")] == [
        "eval: cancer, birads, density by probe, finetune, with 1, 100 % of the labels; 9 fine-tunings a point; "
        "the paper's protocol"
    ]
    points = [Point(replace(p.config, train=replace(p.config.train, ranks=5)), p.differs) for p in points]
    with pytest.raises(ConfigError, match=r"^seed-0: finetune.batch: 72 is not a multiple of the 5 ranks"):
        require_ranks(replace(found, points=points, stages=["eval"]))
