"""Verbs in jobs of two tasks on a real Slurm: the tasks share an evaluation, the first alone does anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from mama.cli.main import cli
from mama.evaluate.evaluation import evaluate
from mama.export.consolidate import LATER, consolidate
from mama.run.files import remove
from mama.settings.load import save
from mama.settings.schema import Config, FinetuneConfig
from shards.pack.pack import pack
from shards.pack.settings import PackConfig
from slurm.profile import Profile
from slurm.submit import submit
from tests.support import jobs
from tests.support.jobs import result_of
from tests.support.saved_run import results_of, small_run

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks
pytest_plugins = ("tests.support.slurm_cluster",)
wait_for = partial(jobs.wait_for, seconds=300)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """With a detector beside its model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "detector.csv").write_text("image,x0,y0,x1,y1,score\ntest001/0.jpg,16,24,24,32,0.5\n")
    config = small_run(folder)
    return replace(config, eval=replace(config.eval, boxes=[str(folder / "detector.csv")]))


@pytest.fixture(scope="module")
def alone(run: Config) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The model and the results of one process each, which are then removed."""
    consolidate(run)
    evaluate(run, run.run_folder)
    found = model_of(run), results_of(run)
    for name in ("model", "eval", "features"):
        remove(run.run_folder / name)
    return found


def model_of(run: Config) -> dict[str, bytes]:
    """The files of the model, without those that an evaluation writes into its folder."""
    folder = run.run_folder / "model"
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in LATER)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def job(cluster: Cluster, folder: Path, *arguments: str) -> list[str]:
    """Submit a verb as a job of two tasks, wait for its end, and return what each task has logged; all must succeed."""
    (folder / "two.yaml").write_text("cluster: slurm\npartition: cpu\ntasks_per_node: 2\n")
    arguments += ("--slurm", "--profile", str(folder / "two.yaml"))
    said = CliRunner().invoke(cli, arguments, catch_exceptions=False).output
    number = said.removeprefix("job ").partition(" ")[0]
    wait_for(lambda: not cluster.jobs())
    place = Path(said.rpartition("its log: ")[2].strip()).parent
    logs = [(place / f"{number}_{task}_log.err").read_text() for task in range(2)]
    assert cluster.run("scontrol", "show", "job", number).count("JobState=COMPLETED") == 1, logs
    return logs


def test_two_tasks_consolidate_once_and_share_the_evaluation(
    slurm_cluster: Cluster, run: Config, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    model, results = alone
    save(run, tmp_path / "run.yaml")
    job(slurm_cluster, tmp_path, "consolidate", str(tmp_path / "run.yaml"))
    assert model_of(run) == model
    first, second = job(slurm_cluster, tmp_path, "eval", str(tmp_path / "run.yaml"))
    assert results_of(run) == results
    assert b'"model": "detector"' in results["eval/alignment/metrics.json"]
    assert first.count("writing the results to") == 1
    assert "trained: test images: 4/4 batches" in first
    assert "writing" not in second
    remove(run.run_folder / "features")
    command = ["srun", "--ntasks=2", "--nodes=1", sys.executable, "-m", "mama", "eval", str(tmp_path / "run.yaml")]
    remove(run.run_folder / "eval")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("writing the results to") == 1
    assert results_of(run) == results


def test_an_evaluation_that_is_preempted_while_it_waits_starts_over_with_the_same_results(
    slurm_cluster: Cluster, run: Config, alone: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    def evaluate_at_second_start(config: Config, folder: str) -> int:
        import os

        from mama.evaluate import localisation

        starts = Path(folder, f"starts{os.environ['SLURM_PROCID']}")
        with starts.open("a") as stream:
            stream.write("*")
        if starts.stat().st_size == 1 and starts.name == "starts1":

            def maps(*arguments: object) -> None:
                time.sleep(3)  # the first task has its own share, and waits for this one
                Path(folder, "waits").touch()
                time.sleep(60)

            localisation.maps = maps  # type: ignore[assignment]
        evaluate(config, config.run_folder)
        return starts.stat().st_size

    consolidate(run)
    remove(run.run_folder / "features")  # the maps are to be computed
    profile = Profile(cluster="slurm", partition="cpu", tasks_per_node=2)
    submitted = submit(evaluate_at_second_start, run, str(tmp_path), profile=profile, folder=tmp_path)
    wait_for(lambda: (tmp_path / "waits").exists())
    slurm_cluster.run("scancel", "--signal=USR2", submitted.job_id)
    state = ("squeue", "--noheader", "--format=%T", f"--jobs={submitted.job_id}")
    wait_for(lambda: slurm_cluster.run(*state) == "PENDING\n", seconds=20)
    slurm_cluster.run("scontrol", "update", f"JobId={submitted.job_id}", "StartTime=now+2")
    assert result_of(submitted) == 2
    assert results_of(run) == alone[1]
    assert Path(submitted.paths.stderr).read_text().count("Requeued job") == 1


def test_one_of_two_tasks_packs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    here = PackConfig(
        source="phantom", root=str(tmp_path / "archive"), out=str(tmp_path / "here"), options={"patients": 3},
        long_side=100, samples_per_shard=2, workers=1, key_file=str(tmp_path / "hash.key"),
    )  # fmt: skip
    pack(here)
    there = replace(here, out=str(tmp_path / "there"))
    document = {"name": "archive", "runs": str(tmp_path / "runs"), "pack": asdict(there)}
    (tmp_path / "archive.yaml").write_text(yaml.safe_dump(document))
    first, second = job(slurm_cluster, tmp_path, "pack", str(tmp_path / "archive.yaml"))
    assert "pack phantom" in first
    assert "pack phantom" not in second, "it has ended at once"
    built = [sorted(Path(config.out).rglob("*.tar")) for config in (here, there)]
    assert [path.read_bytes() for path in built[0]] == [path.read_bytes() for path in built[1]]
    assert (tmp_path / "there" / "manifest.json").read_bytes() == (tmp_path / "here" / "manifest.json").read_bytes()


def test_a_fine_tuning_that_is_preempted_goes_on_and_then_evaluates(
    slurm_cluster: Cluster, run: Config, tmp_path: Path
) -> None:
    def evaluate_slowly(config: Config, folder: str) -> None:
        from mama.finetune import fine_tune
        from mama.finetune.fine_tuning import FineTuning

        step = FineTuning.step

        def slow(self: FineTuning, batches: object, number: int) -> bool:
            if number == 3 and not Path(folder, "waits").exists():
                time.sleep(1)  # both tasks are here
                Path(folder, "waits").touch()
                time.sleep(4)
            return step(self, batches, number)  # type: ignore[arg-type]

        FineTuning.step = slow  # type: ignore[method-assign, assignment]
        fine_tune.evaluate(config, config.run_folder)

    consolidate(run)
    own = FinetuneConfig(steps=6, batch=4, micro_batch=1, warmup_steps=1)
    measured = replace(run.eval, tasks=["cancer"], protocols=["finetune"], intensity_baseline=False)
    config = replace(run, eval=measured, finetune=own)
    profile = Profile(cluster="slurm", partition="cpu", tasks_per_node=2)
    submitted = submit(evaluate_slowly, config, str(tmp_path), profile=profile, folder=tmp_path)
    wait_for(lambda: (tmp_path / "waits").exists())
    slurm_cluster.run("scancel", "--signal=USR2", submitted.job_id)
    state = ("squeue", "--noheader", "--format=%T", f"--jobs={submitted.job_id}")
    wait_for(lambda: slurm_cluster.run(*state).strip() == "PENDING")
    folder = run.run_folder / "finetune" / "cancer-100-0"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000004"]
    slurm_cluster.run("scontrol", "update", f"JobId={submitted.job_id}", "StartTime=now+2")
    assert result_of(submitted) is None
    assert "resumed from" in Path(submitted.paths.stderr).read_text()
    assert json.loads((folder / "complete.json").read_text())["step"] == 6
    rows = json.loads((run.run_folder / "eval" / "cancer" / "metrics.json").read_text())["rows"]
    assert {(row["protocol"], row["fraction"], row["draw"]) for row in rows} == {("fine-tune", 1.0, 0)}
