"""`mama sweep`. It imports what it calls when it runs: `mama --help` answers at once."""

from __future__ import annotations

import sys

import click

from mama.cli.options import Verb, overrides_argument


@click.command(cls=Verb)
@click.argument("sweep")
@overrides_argument
@click.option("--profile", help="Profile of every stage for which the sweep names none; see `mama train --help`.")
@click.option("--dry-run", is_flag=True, help="Print points, batch scripts and GPU-hours; submit nothing.")
@click.option("--retry", is_flag=True, help="Also submit the points that failed.")
def sweep(sweep: str, overrides: tuple[str, ...], profile: str | None, dry_run: bool, retry: bool) -> None:
    """Run a study: many runs, their stages and one table.

    SWEEP is a YAML file, the name of a shipped sweep (quickstart, paper, ...), or the folder of one that was begun.
    Safe to re-run: submits what is missing, and nothing twice. On this machine it runs in the foreground.
    """
    from mama.sweep import dry_run as describe
    from mama.sweep.definition import load_sweep, with_default_profile
    from mama.sweep.local import LocalRun
    from mama.sweep.resources import cluster_of, require_ranks
    from mama.sweep.submission import submit_missing

    found = load_sweep(sweep, overrides)
    if profile:
        found = with_default_profile(found, profile)
    require_ranks(found)
    on_slurm = cluster_of(found) == "slurm"
    if dry_run:
        for line in describe.dry_run(found, retry):
            click.echo(line)
    elif on_slurm:
        lines = submit_missing(found, retry)
        for line in lines or ["nothing to submit: every point is done or in the queue"]:
            click.echo(line)
        click.echo(f"to see how it goes: mama jobs {found.folder}")
    else:
        outcome = LocalRun(found, retry, click.echo).run()
        click.echo(f"{list(outcome.values()).count('done')} of {len(outcome)} points are done")
        for line in describe.lacking(outcome):
            click.echo(line)
        sys.exit(describe.exit_code(outcome))
