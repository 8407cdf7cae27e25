from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mama.cli.main import cli
from mama.settings.load import save
from mama.sweep.definition import load_sweep
from mama.sweep.recognised import is_sweep
from mama.sweep.saved import save_sweep
from tests.support.sweep_results import evaluated, sweep_config

SWEEP = """
name: study
runs: {runs}
recipe: {recipe}
list: [{{}}, {{optim.lr: 0.25}}]
seeds: [1, 2]
baseline: {{optim.lr: 0.25}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(sweep_config(tmp_path), tmp_path / "own.yaml")
    file = tmp_path / "rates.yaml"
    file.write_text(SWEEP.format(runs=tmp_path / "runs", recipe=tmp_path / "own.yaml"))
    return file


def test_a_sweep_is_told_from_a_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_sweep(str(file))
    assert not is_sweep(str(tmp_path / "own.yaml"))
    sweep = load_sweep(file)
    save_sweep(sweep)
    assert is_sweep(str(sweep.folder))
    evaluated(sweep.points[0], 1.0)
    assert not is_sweep(str(sweep.points[0].config.run_folder))
    assert is_sweep("paper")
    assert is_sweep("lr")
    assert not is_sweep("quickstart"), "is a recipe too"
    assert not is_sweep("mama")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()
    assert is_sweep("paper"), "a folder that is no run does not hide it"
    save(sweep.points[0].config, tmp_path / "paper" / "config.yaml")
    assert not is_sweep("paper")
    (tmp_path / "broken.yaml").write_text("grid: [")
    assert not is_sweep("broken.yaml")


def test_the_command_reports_a_sweep_by_its_file_and_by_its_folder(file: Path, tmp_path: Path) -> None:
    sweep = load_sweep(file)
    save_sweep(sweep)
    for point in sweep.points[:3]:
        evaluated(point, 1.0)
    outputs = [CliRunner().invoke(cli, ["report", str(path)]) for path in (file, sweep.folder)]
    for done in outputs:
        assert done.exit_code == 0, done.output
        assert "AUC on shards, test" in done.output
        assert "lr=0.25" in done.output
        assert f"not trained: {sweep.points[3].name}" in done.output
        assert done.output.rstrip().endswith("report-methods.csv")
        for name in ("report.html", "report.md", "report.csv", "report-methods.csv"):
            assert (sweep.folder / name).is_file()
    assert outputs[0].output == outputs[1].output


def test_a_point_of_a_sweep_has_the_report_of_a_run(file: Path) -> None:
    sweep = load_sweep(file)
    save_sweep(sweep)
    evaluated(sweep.points[0], 1.0)
    run = sweep.points[0].config.run_folder
    (run / "eval" / "retrieval" / "examples.json").unlink()  # invented results have no examples
    (run / "eval" / "alignment" / "metrics.json").unlink()
    done = CliRunner().invoke(cli, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(run / "report.html")
