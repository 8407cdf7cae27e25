"""The command line: `mama VERB CONFIG-or-PATH [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import click.shell_completion

from mama.runtime import console, preemption
from mama.runtime.errors import RankError, StoppedError, TrainingError
from mama.settings.load import is_shipped, load, load_profile, load_run, setting_for, shipped_configs
from mama.settings.schema import Config, ConfigError
from shards.files import legible
from shards.schema import ShardError
from slurm.profile import SlurmError

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verb(click.Command):
    """A command that says how settings are changed to whoever takes one for an option."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            if not any(parameter.name == "overrides" for parameter in self.params):
                raise
            near = [name for name in error.possibilities or () if name != "--help"]
            told = click.NoSuchOption(error.option_name, possibilities=near).format_message()
            raise click.UsageError(f"{told} {setting_for(error.option_name)}", context) from error


@click.group(context_settings=HELP)
@click.version_option(package_name="mama-clip")
@click.pass_context
def cli(context: click.Context) -> None:
    """Mammography vision-language pre-training, from DICOM archives to evaluated models.

    CONFIG is a YAML file, the name of a shipped recipe (quickstart, cdd_cesm, ...), or the folder of
    a run that exists. Any setting can be changed behind it as key=value, for example train.steps=100.
    """
    console.start()
    if context.invoked_subcommand != "train":  # which imports for seconds, and then listens itself
        preemption.no_more_early()


cli.command_class = Verb


def configured(path: str, overrides: tuple[str, ...]) -> Config:
    """The configuration that a CONFIG argument and its key=value changes name.

    A run folder is itself the run, wherever it was moved to: its config.yaml may have been written elsewhere, and
    must not lead to another run, whose files would be read, written over or deleted. A folder that is no run does
    not hide a shipped recipe of its name, as mama/ would in a checkout.
    """
    folder = Path(path)
    if "=" in path and not folder.exists():
        raise ConfigError(f"{path}: a setting stands behind CONFIG, for example quickstart {path}")
    if not folder.is_dir() or (not (folder / "config.yaml").exists() and is_shipped(path)):
        return load(path, overrides)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if (name := load_run(folder).name) != folder.name:
        file = folder / "config.yaml"
        raise ConfigError(f"{folder}: its config.yaml is of the run {name!r}; rename the folder, or give {file} itself")
    return load_run(folder, (f"runs={folder.parent}", *overrides))


def complete_config(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Shell completion: shipped recipes, then files."""
    names = [p.stem for p in sorted(shipped_configs().glob("*.yaml")) if p.stem.startswith(incomplete)]
    return [
        *(click.shell_completion.CompletionItem(n) for n in names),
        click.shell_completion.CompletionItem(incomplete, type="file"),
    ]


config_argument = click.argument("config", shell_complete=complete_config)
overrides_argument = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
slurm_option = click.option("--slurm", "as_job", is_flag=True, help="Run as a submitit job instead of here.")
profile_option = click.option(
    "--profile",
    default="local",
    show_default=True,
    help="Where and with what a job runs: a YAML file, or the name of a shipped one.",
)


def run_or_submit(function: Callable[..., Any], *arguments: Any, config: Config, as_job: bool, profile: str) -> None:
    """Call `function(*arguments)` here, or submit that very call as a job and say where its log is."""
    if not as_job:
        function(*arguments)
        return
    from slurm.submit import submit

    name = f"{config.name}-{function.__name__}"
    job = submit(function, *arguments, profile=load_profile(profile), folder=config.run_folder, name=name)
    click.echo(f"job {job.job_id} submitted; its log: {job.paths.stdout}")


def submit_pack(config: Config, jobs: int, profile: str) -> None:
    """Plan the shards here, submit an array of jobs that write them, and one job that ends the build."""
    from shards.pack.pack import make_plan, pack, pack_part
    from slurm.submit import submit_array

    where = load_profile(profile)
    where.require_array()
    parts = min(jobs, max(1, make_plan(config.pack)))
    arguments = [(config.pack, part, parts) for part in range(parts)]
    array, last = submit_array(
        pack_part, arguments, pack, config.pack, profile=where, folder=config.run_folder, name=f"{config.name}-pack"
    )
    number = array[0].job_id.partition("_")[0]
    click.echo(f"array {number} submitted: {parts} jobs, each a part of the shards")
    click.echo(f"job {last.job_id} writes the manifest after them; its log: {last.paths.stdout}")
    click.echo(f"to end the build: scancel {number} {last.job_id}")


@cli.command()
@click.option("--runs", default="runs", show_default=True, help="Folder for the run and its shards.")
@click.option("--seed", default=0, show_default=True, help="Seed of the training run.")
def quickstart(runs: str, seed: int) -> None:
    """The whole line on synthetic studies and real sample DICOM: pack, train, evaluate, report."""
    from mama.quickstart import quickstart as run

    click.echo(run(Path(runs), seed))


@cli.command()
@config_argument
@overrides_argument
@slurm_option
@profile_option
@click.option("--workers", type=int, help="Processes, as pack.workers=N; 0 is one for each core.")
@click.option("--jobs", type=click.IntRange(min=1), help="With --slurm: cut the work over an array of N jobs.")
def pack(
    config: str, overrides: tuple[str, ...], as_job: bool, profile: str, workers: int | None, jobs: int | None
) -> None:
    """Write an archive's studies to tar shards and a manifest (section pack: of CONFIG).

    Type it again after an interruption and it continues; after new studies came to the archive and it adds them.
    """
    from shards.pack.pack import pack as run

    overrides += () if workers is None else (f"pack.workers={workers}",)
    settings = configured(config, overrides)
    if jobs is None:
        run_or_submit(run, settings.pack, config=settings, as_job=as_job, profile=profile)
    elif as_job:
        submit_pack(settings, jobs, profile)
    else:
        raise ConfigError("--jobs: needs --slurm; processes of this machine are --workers")


@cli.group()
def bench() -> None:
    """Measure this machine: the figures of BENCHMARKS.md."""


@bench.command("pack")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
@click.option("--rows", default=(50_000, 500_000), show_default=True, multiple=True, help="Rows of the label tables.")
def bench_pack(rounds: int, rows: tuple[int, ...]) -> None:
    """Packing: images a second for RLE and JPEG 2000, beside a naive loop; workers; joins of label tables."""
    from shards.bench import bench_pack as run

    for line in run(rounds, rows):
        click.echo(line)


@bench.command("loss")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
@click.option("--pairs", default=36, show_default=True, type=click.IntRange(min=1), help="Texts, and images.")
def bench_loss(rounds: int, pairs: int) -> None:
    """The local term at its published size, forward and backward, beside a loop over texts."""
    from mama.bench.loss import bench_loss as run

    for line in run(rounds, pairs):
        click.echo(line)


@bench.command("step")
@click.argument("config", required=False, shell_complete=complete_config)
@overrides_argument
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Steps; medians are printed.")
@click.option(
    "--plain",
    is_flag=True,
    help="Also the step in transformers, peft and PyTorch alone: written with care, and as the published code is.",
)
def bench_step(config: str | None, overrides: tuple[str, ...], rounds: int, plain: bool) -> None:
    """Training steps of CONFIG on synthetic pairs: pairs a second and peak memory on one rank.

    Without CONFIG: the published shapes on a GPU, and tiny ones on the CPU.
    """
    from mama.bench.step import bench_step as run

    for line in run(configured(config, overrides) if config else None, rounds, plain):
        click.echo(line)


@bench.command("load")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
def bench_load(rounds: int) -> None:
    """Loading: pairs a second from JPEG shards to fitted images and tokenised reports."""
    from mama.bench.load import bench_load as run

    for line in run(rounds):
        click.echo(line)


@bench.command("intervals")
@click.option("--rounds", default=500, show_default=True, type=click.IntRange(min=1), help="Evaluations a setting.")
@click.option("--resamples", default=300, show_default=True, type=click.IntRange(min=2), help="As eval.bootstrap.")
def bench_intervals(rounds: int, resamples: int) -> None:
    """Intervals: how often they hold the true value, and their mean length, in simulated evaluations."""
    from mama.bench.intervals import bench_intervals as run

    for line in run(rounds, resamples):
        click.echo(line)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(min=0), help="Decode only so many images of each shard.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page about the shards there.")
def check(folders: tuple[Path, ...], sample: int | None, html: Path | None) -> None:
    """Verify packed shards: hashes, counts, schema, pictures, and patients against the splits.

    Several folders are also compared with each other: no patient in two splits, no image twice.
    """
    from shards.check.check import check_all
    from shards.check.quality import quality_page

    found = check_all(folders, sample)
    for folder, problems in found.items():
        for problem in problems or ["good"]:
            click.echo(f"{folder}: {problem}")
    if html:
        click.echo(quality_page(folders, html, found, sample))
    sys.exit(1 if any(found.values()) else 0)


@cli.command()
@config_argument
@overrides_argument
@slurm_option
@profile_option
@click.option("--dry-run", is_flag=True, help="Print settings, sizes and estimated memory; train and submit nothing.")
def train(config: str, overrides: tuple[str, ...], as_job: bool, profile: str, dry_run: bool) -> None:
    """Pre-train, or resume, the run of CONFIG on train.ranks ranks."""
    settings = configured(config, overrides)
    if dry_run:
        from mama.train.dry_run import dry_run as told

        tasks = load_profile(profile).tasks if as_job else 1
        for line in told(settings, tasks if tasks > 1 else settings.train.ranks):
            click.echo(line)
        return
    from mama.train.loop import train as run

    run_or_submit(run, settings, config=settings, as_job=as_job, profile=profile)


@cli.command()
@config_argument
@overrides_argument
@click.option("--best", is_flag=True, help="The checkpoint with the highest validation score instead.")
def consolidate(config: str, overrides: tuple[str, ...], best: bool) -> None:
    """Turn the newest checkpoint of a run into a portable model/ folder."""
    from mama.export.consolidate import consolidate as run

    click.echo(run(configured(config, overrides), best))


@cli.command("eval")
@config_argument
@overrides_argument
@slurm_option
@profile_option
def evaluate(config: str, overrides: tuple[str, ...], as_job: bool, profile: str) -> None:
    """Measure a consolidated run on held-out patients: zero-shot and linear probe."""
    from mama.evaluate.evaluation import evaluate as run

    settings = configured(config, overrides)
    run_or_submit(run, settings, settings.run_folder, config=settings, as_job=as_job, profile=profile)


@cli.command()
@config_argument
@overrides_argument
def report(config: str, overrides: tuple[str, ...]) -> None:
    """Write runs/<name>/report.html from what training and evaluation left there."""
    from mama.report.page import write_report

    settings = configured(config, overrides)
    click.echo(write_report(settings, settings.run_folder))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion script: eval "$(mama completion bash)"."""
    script = click.shell_completion.get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "mama", "_MAMA_COMPLETE").source())


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a run that failed 1, one that a signal stopped 75."""
    try:
        cli(prog_name="mama")
    except (ConfigError, ShardError, SlurmError) as error:
        # One line also where a name out of somebody's file is quoted in it, and nothing that steers a terminal.
        click.echo("mama: " + "".join(c if c.isprintable() else " " for c in legible(str(error))), err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        click.echo(f"mama: {error.filename}: {error.strerror}", err=True)
        sys.exit(2)
    except StoppedError as error:
        click.echo(f"mama: {error}", err=True)
        sys.exit(preemption.STOPPED)
    except (RankError, TrainingError) as error:
        click.echo(f"mama: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
