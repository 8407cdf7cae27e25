"""`mama pack` and `mama check`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mama.cli.options import Verb, config_arguments, configured, job_options, run_or_submit, tell_if_it_never_starts
from mama.errors import ConfigError
from mama.settings.load import load_profile
from mama.settings.schema import Config


@click.command(cls=Verb)
@config_arguments
@job_options
@click.option("--workers", type=int, help="Processes, as pack.workers=N; 0 is one for each core.")
@click.option("--jobs", type=click.IntRange(min=1), help="With --slurm: split the shards over an array of N jobs.")
def pack(
    config: str, overrides: tuple[str, ...], as_job: bool, profile: str, workers: int | None, jobs: int | None
) -> None:
    """Pack an archive's studies to tar shards and a manifest.

    The section pack: of CONFIG describes the archive. Safe to re-run: continues an interrupted build, and appends
    shards for studies added since.
    """
    from shards.pack.pack import pack as run

    overrides += () if workers is None else (f"pack.workers={workers}",)
    settings = configured(config, overrides)
    if jobs is None:
        run_or_submit(run, settings.pack, config=settings, as_job=as_job, profile=profile)
    elif as_job:
        _submit_array(settings, jobs, profile)
    else:
        raise ConfigError("--jobs: needs --slurm; processes of this machine are --workers")


def _submit_array(config: Config, jobs: int, profile: str) -> None:
    """Plan the shards here, submit an array of jobs that write them, and a last job that completes the build."""
    from mama.run.environment import copy_code
    from shards.pack.pack import make_plan, pack, pack_part
    from slurm.submit import submit_array

    resources = load_profile(profile)
    resources.require_cluster()
    resources.require_one_task()
    parts = min(jobs, max(1, make_plan(config.pack)))
    arguments = [(config.pack, part, parts) for part in range(parts)]
    name = f"{config.name}-pack"
    folder = config.run_folder
    places = {"folder": folder, "code": copy_code(folder / "code")}
    array, last = submit_array(pack_part, arguments, pack, config.pack, profile=resources, name=name, **places)
    number = array[0].job_id.partition("_")[0]
    click.echo(f"array {number} submitted: {parts} jobs, each of which writes a part of the shards")
    click.echo(f"job {last.job_id} writes the manifest after them; its log: {last.paths.stdout}")
    click.echo(f"to cancel the build: scancel {number} {last.job_id}")
    tell_if_it_never_starts(number, profile)


@click.command(cls=Verb)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--sample", type=click.IntRange(min=0), help="Decode only this many images of each shard.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page about the shards to this file.")
def check(folders: tuple[Path, ...], sample: int | None, html: Path | None) -> None:
    """Verify shards: hashes, counts, schema, images, splits.

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
