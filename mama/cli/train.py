"""`mama train` and `mama consolidate`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import click

from mama.cli.options import Verb, config_arguments, configured, job_options, run_or_submit
from mama.settings.load import load_profile


@click.command(cls=Verb)
@config_arguments
@job_options
@click.option("--dry-run", is_flag=True, help="Print settings, sizes and estimated memory; train and submit nothing.")
def train(config: str, overrides: tuple[str, ...], as_job: bool, profile: str, dry_run: bool) -> None:
    """Pre-train the run of CONFIG, or resume it.

    Starts train.ranks ranks on this machine; under torchrun, srun or --slurm each task is a rank.
    """
    settings = configured(config, overrides)
    tasks = load_profile(profile).tasks if as_job else 1
    ranks = tasks if tasks > 1 else settings.train.ranks
    if dry_run:
        from mama.train.dry_run import dry_run as describe

        for line in describe(settings, ranks):
            click.echo(line)
        return
    if as_job:
        settings.train.accumulation(ranks)  # fail now, not in the job
    from mama.train.loop import train as run

    run_or_submit(run, settings, config=settings, as_job=as_job, profile=profile, tasks_share=True)


@click.command(cls=Verb)
@config_arguments
@job_options
@click.option("--best", is_flag=True, help="The checkpoint with the highest validation score instead.")
def consolidate(config: str, overrides: tuple[str, ...], as_job: bool, profile: str, best: bool) -> None:
    """Export a run's newest checkpoint as a portable folder model/."""
    from mama.export.consolidate import consolidate as run

    settings = configured(config, overrides)
    if folder := run_or_submit(run, settings, best, config=settings, as_job=as_job, profile=profile):
        click.echo(folder)
