"""The command line: its verbs and options, output, streams and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import EntryPoint, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import CompletionItem
from click.testing import CliRunner

from mama import __main__ as entry_point
from mama.cli.main import cli, main
from mama.cli.options import LEFT_TO_FIRST, call_in_task, complete_config, configured
from mama.errors import RankError, TrainingError
from mama.export.consolidate import Export
from mama.settings.load import load, save
from mama.settings.schema import Config
from slurm.profile import Profile
from tests.support.checkout import CHECKOUT
from tests.support.cohort import write_shards

JOB = ["--profile", "--slurm"]
INPUTS = ["--base", "--for-processing", *JOB, "--split", "--workers", "inputs", "model"]
# Every verb and its arguments and options: users' scripts depend on them.
COMMAND_LINE = {
    "bench checkpoint": ["--folder", "--ranks", "--rounds", "--sizes", "--stages"],
    "bench consolidate": ["--folder", "--rounds", "--sizes", "--stage"],
    "bench intervals": ["--resamples", "--rounds"],
    "bench load": ["--rounds"],
    "bench loss": ["--pairs", "--rounds"],
    "bench pack": ["--rounds", "--rows"],
    "bench predict": ["--rounds", "model"],
    "bench step": ["--plain", "--rounds", "config", "overrides"],
    "check": ["--html", "--sample", "folders"],
    "completion": ["shell"],
    "consolidate": [
        *(
            "--best",
            "--dtype",
            "--lora",
            "--out",
            "--profile",
            "--shard-size",
            "--slurm",
            "--step",
            "config",
            "overrides",
        ),
    ],
    "embed": sorted([*INPUTS, "--out"]),
    "eval": ["--on", *JOB, "config", "overrides"],
    "jobs cancel": ["points"],
    "jobs logs": ["--stage", "-n", "points"],
    "jobs retry": ["points"],
    "jobs show": ["--watch", "sweep"],
    "pack": ["--jobs", *JOB, "--workers", "config", "overrides"],
    "predict": sorted([*INPUTS, "--ask", "--html", "--neighbours", "--out", "--pool", "--task"]),
    "quickstart": ["--runs", "--seed"],
    "report": ["config", "overrides"],
    "sweep": ["--dry-run", "--profile", "--retry", "overrides", "sweep"],
    "train": ["--dry-run", *JOB, "config", "overrides"],
}
VERBS = [
    *("bench", "check", "completion", "consolidate", "embed", "eval", "jobs", "pack", "predict", "quickstart"),
    *("report", "sweep", "train"),
]
RECIPES = [
    "cdd_cesm",
    "clip",
    "convirt",
    "mama",
    "mama_published_code",
    "quickstart",
    "sample_dicom",
    "slip",
    "table",
]
NO_SHARDS = "no manifest.json, so this is not a finished folder of shards; run `mama pack`"

Mama = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Libraries may print when they are imported: let them do so before a test looks at stderr."""
    import_module("mama.train.loop")
    import_module("mama.evaluate.evaluation")


@pytest.fixture
def mama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Mama:
    """Run `mama ARGUMENTS` by its entry point in an empty folder: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mama", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def typed(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`mama ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mama", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "shards"
    write_shards(folder, {"train": 4, "test": 2})
    return folder


def listed(*arguments: str) -> dict[str, str]:
    """Verb -> its line in a help page at 80 columns."""
    result = CliRunner().invoke(cli, [*arguments, "--help"], terminal_width=80)
    assert result.exit_code == 0
    return dict(line.split(maxsplit=1) for line in result.output.partition("Commands:\n")[2].splitlines())


def test_the_verbs_and_their_options_are_these() -> None:
    found: dict[str, list[str]] = {}
    for name, verb in cli.commands.items():
        for below, command in verb.commands.items() if isinstance(verb, click.Group) else [("", verb)]:
            found[f"{name} {below}".strip()] = sorted(p.opts[0] for p in command.params)
    assert found == COMMAND_LINE


def test_help_lists_every_verb_with_its_whole_first_line() -> None:
    bench = cli.commands["bench"]
    assert isinstance(bench, click.Group)
    for page, commands in ((listed(), cli.commands), (listed("bench"), bench.commands)):
        assert page == {name: (command.help or "").partition("\n")[0] for name, command in sorted(commands.items())}
    assert list(listed()) == VERBS
    assert all(len(line) > 20 for line in listed().values())
    output = CliRunner().invoke(cli, ["--help"]).output
    for recipe in ("quickstart", "cdd_cesm", "train.steps=100"):
        assert recipe in output


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_explains_itself_and_its_options(verb: str, flag: str) -> None:
    result = CliRunner().invoke(cli, [verb, flag], prog_name="mama")
    assert result.exit_code == 0
    command = cli.commands[verb]
    assert result.output.startswith(f"Usage: mama {verb} [OPTIONS]")
    explained = " ".join(result.output.split())
    assert command.help
    assert " ".join(command.help.split()) in explained
    options = [p for p in command.params if isinstance(p, click.Option)]
    for option in options:
        assert option.opts[0] in explained
        assert option.help
        assert option.help in explained


@pytest.mark.parametrize("verb", ["pack", "train", "consolidate", "eval", "report"])
def test_every_verb_with_a_configuration_takes_changes_behind_it(verb: str) -> None:
    result = CliRunner().invoke(cli, [verb, "--help"])
    assert "CONFIG [KEY=VALUE]..." in result.output.splitlines()[0]


def test_the_version_is_that_of_the_distribution() -> None:
    assert CliRunner().invoke(cli, ["--version"], prog_name="mama").output.split()[-1] == version("mama-clip")


def test_an_unknown_verb_is_named(mama: Mama) -> None:
    code, out, err = mama("trian")
    assert (code, out) == (2, "")
    assert "'trian'" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["pack", "check", "train", "consolidate", "eval", "report", "completion"])
def test_a_verb_without_its_argument_says_which_one(mama: Mama, verb: str) -> None:
    code, out, err = mama(verb)
    assert (code, out) == (2, "")
    assert "Missing argument" in err
    assert "Traceback" not in err


def test_an_unknown_option_is_named(mama: Mama) -> None:
    code, _, err = mama("train", "quickstart", "--slrum")
    assert code == 2
    assert "--slrum" in err.splitlines()[-1]


def test_a_setting_typed_as_an_option_is_told_how_settings_are_typed(mama: Mama) -> None:
    for option, setting in (
        *(("--steps", "train.steps or finetune.steps"), ("--batch-size", "train.global_batch")),
        *(("--seed", "seed"), ("--image-sise", "data.image_size")),
    ):
        code, _, err = mama("train", "quickstart", option, "3")
        assert code == 2
        example = f"Settings follow CONFIG as key=value, for example train.steps=100; did you mean {setting}?"
        assert err.rstrip().endswith(example)
        assert "--help" not in err.splitlines()[-1]  # as the option that was meant


def test_a_folder_that_is_no_run_does_not_hide_a_shipped_recipe(mama: Mama, tmp_path: Path) -> None:
    """In a checkout there is mama/, and elsewhere perhaps a folder clip/ of the user's own."""
    (tmp_path / "clip").mkdir()
    code, _, err = mama("consolidate", "clip")
    assert (code, err) == (2, "mama: runs/clip: no complete checkpoint; train first\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["pack", "quickstart", "pack.qualty=3"], "pack.qualty: unknown key; did you mean pack.quality?"),
        (
            ["pack", "quickstart", "pack.source=phantm"],
            "pack.source: 'phantm' is not one of cbis_ddsm, cdd_cesm, cmmd, embed, inbreast, phantom",
        ),
        (["pack", "cdd_cesm", "pack.root=nowhere"], "pack.root: nowhere must hold Radiology-manual-annotations.xlsx"),
        (["pack", "sample_dicom", "pack.root=package:nobody"], "pack.root: the package 'nobody' is not installed"),
        (["pack", "quickstart", "pack.root=''"], "pack.root: is empty; name a folder"),
        (["pack", "quickstart", "pack.options.seeds=3"], "pack.options.seeds: source 'phantom' has patients, seed"),
        (
            ["pack", "quickstrat"],
            "quickstrat: no such run folder or configuration file, nor a shipped one (cdd_cesm, clip",
        ),
        (["pack", "empty"], "empty/config.yaml: no such configuration file"),
        (["pack", "quickstart", "pack.workers"], "pack.workers: expected key=value, for example train.steps=100"),
        (["train", "quickstart", "train.stepz=3"], "train.stepz: unknown key; did you mean train.steps?"),
        (["train", "quickstart", "train.steps=0"], "train.steps: 0 is less than 1"),
        (
            ["train", "quickstart", "name=.."],
            "name: '..' is not the name of one folder; the folder that holds it is ru",
        ),
        (["consolidate", "quickstart"], "runs/quickstart: no complete checkpoint; train first"),
        (["consolidate", "quickstart", "--step", "3"], "runs/quickstart: has no checkpoint of step 3; there are none"),
        (["consolidate", "quickstart", "--best", "--step", "3"], "--best: names one checkpoint and step 3 another;"),
        (
            ["consolidate", "quickstart", "--out", "bad.yaml"],
            "--out: bad.yaml exists and is no model folder; name another",
        ),
        (["consolidate", "quickstart", "--out", ""], "--out: is empty; name a folder"),
        (["consolidate", "quickstart", "--out", "."], "--out: . is the folder that this command runs in, or above it;"),
        (["consolidate", "quickstart", "--shard-size", "4"], "--shard-size: '4' is no size; write it as 4GB or 500MB"),
        (["consolidate", "quickstart", "--shard-size", "0.1B"], "--shard-size: '0.1B' is no size; write it as 4GB"),
        (["consolidate", "quickstart", "--dtype", "fp16"], "--dtype: 'fp16' is not one of fp32, bf16"),
        (["consolidate", "quickstart", "--lora", "adapter"], "--lora adapter: text.model is null"),
        (["consolidate", "away/step-000500"], "away/step-000500: is a checkpoint outside of its run; move it back"),
        (["consolidate", "away"], "away: is a model folder already; name its run, or a checkpoint"),
        (["eval", "quickstart"], f"runs/shards/phantom: {NO_SHARDS}"),
        (["eval", "quickstart", "data.shards=[SHARDS]"], "runs/quickstart: no such run folder; train first"),
        (["eval", "quickstart", "eval.tasks=[cancre]"], "eval.tasks: 'cancre' is not one of cancer, malignancy, birad"),
        (["train", "train.steps=3", "quickstart"], "train.steps=3: settings follow CONFIG"),
        (["report", "runs/nothing"], "runs/nothing: no such run folder or configuration file"),
        (["report", "quickstart"], "runs/quickstart: no such run folder; train first"),
        (
            ["train", "quickstart", "--slurm", "--profile", "nowhere.yaml"],
            "nowhere.yaml: no such profile, nor a shipped one (cluster, cpu, local)",
        ),
        (["train", "quickstart", "--slurm", "--profile", "bad.yaml"], "bad.yaml: unknown key partitoin; did you mean"),
        (
            ["eval", "quickstart", "--slurm", "--profile", "worse.yaml"],
            "worse.yaml: nodes: 'two' is not a whole number",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    mama: Mama, tmp_path: Path, shards: Path, arguments: list[str], line: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "away" / "step-000500").mkdir(parents=True)
    (tmp_path / "away" / "model.json").touch()
    (tmp_path / "bad.yaml").write_text("partitoin: gpu\n")
    (tmp_path / "worse.yaml").write_text("nodes: two\n")
    arguments = [a.replace("SHARDS", str(shards)) for a in arguments]
    if arguments[0] == "pack":
        arguments.append(f"pack.key_file={tmp_path}/key")
    code, out, err = mama(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(f"mama: {line}")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert not list(tmp_path.rglob("manifest.json")), "nothing looks finished"


def test_training_without_shards_is_one_line_although_a_rank_finds_it(mama: Mama, tmp_path: Path) -> None:
    code, out, err = mama("train", "quickstart", "train.ranks=1", "data.shards=[nowhere]")
    assert (code, out) == (2, "")
    assert err == f"mama: nowhere: {NO_SHARDS}\n"
    assert not (tmp_path / "runs" / "quickstart" / "config.yaml").exists(), "the mended run must not be refused"


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": ""},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "x"},
    ],
)
def test_a_rank_that_no_launcher_has_started_is_one_line(
    mama: Mama, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = mama("train", "quickstart")
    assert (code, out) == (2, "")
    assert err.startswith(f"mama: RANK: RANK={environment['RANK']!r}, WORLD_SIZE=")
    assert err.count("\n") == 1


def test_a_batch_that_cannot_be_cut_is_the_last_line_of_training(mama: Mama, shards: Path) -> None:
    code, out, err = mama("train", "quickstart", "train.global_batch=63", "train.ranks=1", f"data.shards=[{shards}]")
    assert (code, out) == (2, "")
    expected = "63 is not a multiple of micro_batch x ranks = 32 x 1; change one of the three"
    assert err.splitlines()[-1] == f"mama: train.global_batch: {expected}"
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = typed("pack", "sample_dicom", "pack.out=file", f"pack.key_file={tmp_path}/key", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_mistake_leaves_a_process_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = typed("pack", "quickstart", "pack.qualty=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mama: pack.qualty: unknown key; did you mean pack.quality?\n"


def test_a_failure_that_is_not_the_users_is_one_line_and_exit_code_1(
    mama: Mama, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RankError("rank 1 failed: killed"), TrainingError("step 3: the loss is nan")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("mama.train.loop.train", fail)
        assert mama("train", "quickstart") == (1, "", f"mama: {error}\n")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_an_error_of_the_machine_is_one_line_also_without_a_file_name(
    mama: Mama, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    for place, named in (((), "a file could not be read or written"), (("x/state",), "x/state")):

        def fail(*_: object, place: tuple[str, ...] = place) -> None:
            raise OSError(error, os.strerror(error), *place)

        monkeypatch.setattr("mama.train.loop.train", fail)
        assert mama("train", "quickstart") == (2, "", f"mama: {named}: {os.strerror(error)}\n")


def test_check_says_good_and_exits_0(mama: Mama, shards: Path) -> None:
    code, out, _ = mama("check", str(shards))
    assert (code, out) == (0, f"{shards}: good\n")


def test_check_exits_1_and_names_what_is_damaged(mama: Mama, tmp_path: Path, shards: Path) -> None:
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    (tar,) = damaged.glob("train-*.tar")
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    code, out, _ = mama("check", str(damaged))
    assert code == 1
    assert out.startswith(f"{damaged}: {tar.name}: its SHA-256 differs")
    assert out.count("\n") == 1
    code, out, _ = mama("check", str(shards), str(damaged))
    assert code == 1
    assert out.splitlines()[0] == f"{shards}: good"
    assert len(out.splitlines()) == 3
    assert "6 studies are also in" in out.splitlines()[2]


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[]", b"{}", b'{"schema": 1}'])
def test_check_of_what_is_no_shard_folder_is_one_line(mama: Mama, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "manifest.json").write_bytes(content)
    code, out, err = mama("check", "folder")
    assert code == 1
    assert out.startswith("folder: ")
    assert not out.startswith("folder: folder")
    assert out.count("\n") == 1
    assert err == ""


def test_a_run_folder_is_a_configuration(mama: Mama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    save(Config(name="mine", seed=5), tmp_path / "runs" / "mine" / "config.yaml")
    seen: list[Config] = []

    def consolidated(config: Config, export: Export) -> Path:
        assert export == Export()
        seen.append(config)
        return config.run_folder

    monkeypatch.setattr("mama.export.consolidate.consolidate", consolidated)
    code, out, _ = mama("consolidate", "runs/mine", "seed=5")
    assert (code, out) == (0, "runs/mine\n")
    assert seen == [Config(name="mine", seed=5)]

    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "runs" / "mine", tmp_path / "moved" / "mine")
    assert mama("consolidate", "moved/mine")[1] == "moved/mine\n", "not runs/mine, which may be another run"
    assert mama("consolidate", f"{tmp_path}/moved/mine/", "name=other")[1] == f"{tmp_path}/moved/other\n"
    monkeypatch.chdir(tmp_path / "moved" / "mine")
    assert configured(".", ()).run_folder == tmp_path / "moved" / "mine"
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "moved" / "mine", tmp_path / "moved" / "yours")
    file = "moved/yours/config.yaml"
    code, _, err = mama("consolidate", "moved/yours")
    assert (code, err) == (
        2,
        f"mama: moved/yours: its config.yaml is of the run 'mine'; rename the folder, or give {file} itself\n",
    )
    assert mama("consolidate", file)[1] == "runs/mine\n"


def test_a_model_is_described_by_the_record_of_its_run(
    mama: Mama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe = tmp_path / "runs" / "mine", tmp_path / "mine.yaml"
    run.mkdir(parents=True)
    trained = Config(name="mine", seed=5)
    save(trained, run / "config.yaml")
    recipe.write_text("name: mine\nseed: 7\ndata: {image_size: [32, 32]}\n")
    seen: list[Config] = []

    def consolidated(config: Config, export: Export) -> Path:
        seen.append(config)
        return config.run_folder

    monkeypatch.setattr("mama.export.consolidate.consolidate", consolidated)
    assert mama("consolidate", "mine.yaml")[0] == 0
    assert seen.pop() == trained
    said = "runs/mine: was trained with another data.image_size than this configuration has; its own settings hold"
    assert caplog.messages == [said]
    for change, key in (
        ("data.image_size=[32, 32]", "data.image_size: \\(32, 32\\)"),
        ("eval.bootstrap=5", "eval.bootstrap: 5"),
        ("vision.config.hidden_size=48", "vision.config.hidden_size: 48"),
    ):
        for named in ("mine.yaml", "runs/mine", "runs/mine/config.yaml"):
            code, _, err = mama("consolidate", named, change)
            assert code == 2
            assert re.fullmatch(f"mama: {key}, but \\S+ was trained with [^\n]+; leave it out\n", err), err
    places = ("data.shards=[/new/shards]", "data.cache=/new/cache", "text.model=/new/lm", "vision.model=/new/vit")
    moved = (*places, "train.ranks=8", "train.micro_batch=4")  # these may be typed behind every verb of a job
    assert mama("consolidate", "runs/mine", *moved)[0] == 0
    assert seen.pop() == load(run / "config.yaml", moved)
    run.rename(tmp_path / "runs" / "copy")
    assert mama("consolidate", "mine.yaml", "name=copy")[0] == 0
    assert seen.pop() == replace(trained, name="copy")
    assert mama("consolidate", "mine.yaml", "train.steps=4")[0] == 0, "a run without a record: as it is configured"
    (tmp_path / "runs" / "copy").rename(run)
    (run / "checkpoints" / "step-000003").mkdir(parents=True)
    assert mama("consolidate", "runs/mine/checkpoints/step-000111")[0] == 0, "the step is sought by consolidation"


# The last of each: whether the tasks of a job share the work, which the first one does alone otherwise.
JOBS: list[tuple[list[str], str, Callable[[Config], tuple[Any, ...]], bool]] = [
    (["pack", "quickstart", "pack.quality=90"], "shards.pack.pack.pack", lambda config: (config.pack,), False),
    (["train", "quickstart", "train.steps=3"], "mama.train.loop.train", lambda config: (config,), True),
    (["consolidate", "quickstart"], "mama.export.consolidate.consolidate", lambda config: (config, Export()), False),
    (
        ["eval", "quickstart", "seed=9"],
        "mama.finetune.fine_tune.evaluate",
        lambda config: (config, config.run_folder, click.echo),
        True,
    ),
]


@pytest.mark.parametrize(("arguments", "function", "expected", "shared"), JOBS, ids=[job[1] for job in JOBS])
def test_a_verb_runs_the_same_call_here_and_as_a_job(
    mama: Mama,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    function: str,
    expected: Callable[[Config], tuple[Any, ...]],
    shared: bool,
) -> None:
    def stand_in(*values: Any) -> None:
        here.append(values)

    def submitted(called: Any, *values: Any, **words: Any) -> Any:
        jobs.append((called, values, words))
        return SimpleNamespace(job_id="17", paths=SimpleNamespace(stdout="a/log"))

    here: list[tuple[Any, ...]] = []
    jobs: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(function, stand_in)
    monkeypatch.setattr("slurm.submit.submit", submitted)
    (tmp_path / "mine.yaml").write_text("cluster: slurm\npartition: gpu\nnodes: 2\n")
    config = load("quickstart", arguments[2:])

    assert mama(*arguments)[0] == 0
    assert (here, jobs) == ([expected(config)], [])

    code, out, _ = mama(*arguments, "--slurm", "--profile", "mine.yaml")
    assert (code, out) == (0, "job 17 submitted; its log: a/log\n")
    assert len(here) == 1
    ((called, values, words),) = jobs
    assert called is call_in_task
    assert values == (stand_in, expected(config), shared)
    assert words["profile"] == Profile("slurm", "gpu", nodes=2)
    assert words["folder"] == config.run_folder

    mama(*arguments, "--slurm")
    assert jobs[1][2]["profile"].cluster == "local"


def test_of_the_tasks_of_a_step_the_first_alone_consolidates(
    mama: Mama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others of `srun -n 4 mama consolidate RUN` leave nothing and end well; they do work that was cut for them."""
    caplog.set_level(logging.INFO)
    for executor, name in ((None, "SLURM_PROCID"), ("slurm", "SLURM_PROCID"), ("local", "SUBMITIT_LOCAL_GLOBALID")):
        with monkeypatch.context() as task:
            task.delenv("SUBMITIT_EXECUTOR", raising=False)
            if executor:
                task.setenv("SUBMITIT_EXECUTOR", executor)
            task.setenv(name, "3")
            caplog.clear()
            assert mama("consolidate", "nowhere") == (0, "", "")
            assert [record.getMessage() for record in caplog.records] == [LEFT_TO_FIRST]
            assert list(tmp_path.iterdir()) == []
            assert "Export a run's newest checkpoint" in mama("consolidate", "--help")[1]
            assert mama("predict", "nowhere", "nothing")[0] == 2


def test_the_first_task_of_a_step_works_and_the_others_log_one_line(tmp_path: Path) -> None:
    mistake = "mama: runs/quickstart: no complete checkpoint; train first\n"
    for task, expected in (("0", (2, mistake)), ("1", (0, f"{LEFT_TO_FIRST}\n"))):
        done = typed("consolidate", "quickstart", cwd=tmp_path, SLURM_PROCID=task, SLURM_STEP_NUM_TASKS="2")
        assert (done.returncode, done.stderr) == expected


def test_every_task_of_a_step_is_a_rank_of_train_and_eval_but_one_alone_submits(
    mama: Mama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ranks: list[str] = []
    monkeypatch.setattr("mama.train.loop.train", lambda config: ranks.append("train"))
    monkeypatch.setattr("mama.finetune.fine_tune.evaluate", lambda config, *more: ranks.append("eval"))
    monkeypatch.setattr("slurm.submit.submit", lambda *values, **words: ranks.append("submitted"))
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    for verb in ("train", "eval"):
        assert mama(verb, "quickstart")[0] == 0
    assert ranks == ["train", "eval"]
    for verb in ("train", "eval"):
        caplog.clear()
        assert mama(verb, "quickstart", "--slurm")[0] == 0
        assert [record.getMessage() for record in caplog.records] == [LEFT_TO_FIRST]
    assert ranks == ["train", "eval"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(tmp_path: Path, shell: str) -> None:
    done = typed("completion", shell, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"_MAMA_COMPLETE={shell}_complete" in done.stdout
    assert done.stderr == ""


def test_a_shell_without_completion_is_named_beside_those_with_it(mama: Mama) -> None:
    code, out, err = mama("completion", "tcsh")
    assert (code, out) == (2, "")
    assert all(word in err.splitlines()[-1] for word in ("'tcsh'", "'bash'", "'zsh'", "'fish'"))


def offered(incomplete: str) -> list[CompletionItem]:
    context = click.Context(cli.commands["train"], help_option_names=["-h", "--help"])
    return complete_config(context, cli.commands["train"].params[0], incomplete)


def test_completion_offers_shipped_recipes_and_then_files() -> None:
    items = offered("")
    assert [item.value for item in items if item.type == "plain"] == RECIPES
    assert items[-1].type == "file"
    assert [(item.value, item.type) for item in offered("qui")] == [("quickstart", "plain"), ("qui", "file")]
    assert [(item.value, item.type) for item in offered("my/")] == [("my/", "file")]


@pytest.mark.parametrize("verb", ["pack", "train", "consolidate", "eval", "report"])
def test_every_configuration_argument_completes_to_recipes(verb: str) -> None:
    (argument,) = (p for p in cli.commands[verb].params if p.name == "config")
    items = argument.shell_complete(click.Context(cli.commands[verb]), "cdd")
    assert [item.value for item in items if item.type == "plain"] == ["cdd_cesm"]


def test_a_shell_that_asks_is_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from mama.cli.main import main; main()"]
    words = {"_MAMA_COMPLETE": "bash_complete", "COMP_WORDS": "mama train qu", "COMP_CWORD": "2"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["plain,quickstart", "file,qu"]
    words |= {"COMP_WORDS": "mama ", "COMP_CWORD": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **words}, capture_output=True, text=True, check=False
    )
    assert [line.removeprefix("plain,") for line in done.stdout.splitlines()] == VERBS


def test_main_is_what_the_installed_command_calls() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert EntryPoint("mama", project["scripts"]["mama"], "console_scripts").load() is entry_point.main
