"""`mama train` and `mama consolidate`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mama.cli.options import (
    Verb,
    config_arguments,
    configured,
    configured_checkpoint,
    importing,
    is_left_to_first_task,
    job_options,
    run_or_submit,
    size_in_bytes,
)
from mama.errors import ConfigError
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
@click.option("--step", type=int, help="The checkpoint after this many steps instead of the newest.")
@click.option("--best", is_flag=True, help="The checkpoint with the highest validation score instead.")
@click.option("--dtype", default="fp32", show_default=True, help="Type of the weights: fp32 or bf16.")
@click.option("--lora", default="merged", show_default=True, help="merged into the weights, or adapter: by itself.")
@click.option("--shard-size", metavar="SIZE", show_default="one file", help="Largest file of a tower, such as 4GB.")
@click.option("--out", metavar="DIR", show_default="model/ in the run folder", help="Folder of the model.")
def consolidate(config: str, overrides: tuple[str, ...], as_job: bool, profile: str, **options: Any) -> None:
    """Export a run's newest checkpoint as a portable folder model/.

    CONFIG may also be the folder of a checkpoint, such as RUN/checkpoints/step-000500.
    """
    if is_left_to_first_task():  # ranks of training may consolidate at its end
        return
    with importing():
        from mama.export.consolidate import Export, require
        from mama.export.consolidate import consolidate as run

    settings, step = configured_checkpoint(config, overrides)
    if step is not None and (options["best"] or options["step"] is not None):
        raise ConfigError(f"{config}: is a checkpoint itself; leave out {'--best' if options['best'] else '--step'}")
    if options["out"] == "":
        raise ConfigError("--out: is empty; name a folder")
    export = Export(
        step=options["step"] if step is None else step,
        best=options["best"],
        dtype=options["dtype"],
        lora=options["lora"],
        largest=None if options["shard_size"] is None else size_in_bytes("--shard-size", options["shard_size"]),
        out=None if options["out"] is None else Path(options["out"]),
    )
    require(settings, export)  # fail now, not in the job
    if folder := run_or_submit(run, settings, export, config=settings, as_job=as_job, profile=profile):
        click.echo(folder)
