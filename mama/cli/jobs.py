"""`mama jobs ...`: the jobs of sweeps and runs. It imports what it calls when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from mama.cli.options import Verb


class JobsGroup(click.Group):
    """A group whose first command may be left out: `mama jobs runs/lr` is `mama jobs show runs/lr`."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse the words behind `jobs`: none, or options of `show` alone, are for `show`."""
        is_bare = not arguments or (arguments[0].startswith("-") and arguments[0] not in context.help_option_names)
        if is_bare and not context.resilient_parsing:
            arguments = ["show", *arguments]
        return super().parse_args(context, arguments)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a word that is none is the sweep or the run to show."""
        if arguments[0] not in self.commands:
            arguments = ["show", *arguments]
        return super().resolve_command(context, arguments)


@click.group(cls=JobsGroup, subcommand_metavar="[SWEEP | RUN | COMMAND ...]")
def jobs() -> None:
    """Show the jobs of sweeps and runs; read their logs, end them.

    mama jobs SWEEP is short for mama jobs show SWEEP. Without a name: all in runs/.
    """


_POINTS = click.argument("points", nargs=-1, required=True, metavar="POINT...", type=click.Path(path_type=Path))


@jobs.command("show", cls=Verb)
@click.argument("sweep", required=False, metavar="[SWEEP | RUN]", type=click.Path())
@click.option("--watch", is_flag=True, help="Look again every few seconds, until Ctrl-C.")
def show_jobs(sweep: str | None, watch: bool) -> None:
    """Table of what each point does, and why what failed did so.

    SWEEP is a sweep's file, the name of a shipped one, or its folder runs/SWEEP; RUN is a run folder whose jobs --slurm
    submitted. Without either: every sweep and run in runs/ that has jobs.
    """
    from rich.console import Console

    from mama.jobs import table as jobs_table
    from mama.jobs.rows import listings

    console = Console(highlight=False)
    if watch:
        jobs_table.watch(lambda: listings(sweep), console)
    else:
        jobs_table.show(listings(sweep), console)


@jobs.command("logs", cls=Verb)
@_POINTS
@click.option("-n", "lines", default=50, show_default=True, type=click.IntRange(min=1), help="Lines of each log.")
@click.option("--stage", help="Of this stage, such as train or eval; else of the newest.")
def show_logs(points: tuple[Path, ...], lines: int, stage: str | None) -> None:
    """Last lines of the newest job's stderr and stdout.

    POINT is a run folder, runs/SWEEP/POINT or runs/RUN.
    """
    from mama.jobs.actions import folders, logs

    for point in folders(points):
        for line in logs(point, lines, stage):
            click.echo(line)


@jobs.command("cancel", cls=Verb)
@_POINTS
def cancel_jobs(points: tuple[Path, ...]) -> None:
    """Cancel what waits; what trains saves and stops.

    POINT is a run folder, runs/SWEEP/POINT or runs/RUN, or runs/SWEEP for all its points. The command that submitted it
    submits it again.
    """
    from mama.jobs.actions import cancel, folders

    for point in folders(points):
        for line in cancel(point):
            click.echo(line)


@jobs.command("retry", cls=Verb)
@_POINTS
def retry_jobs(points: tuple[Path, ...]) -> None:
    """Submit what these points of a sweep lack, also what failed.

    POINT is runs/SWEEP/POINT, or runs/SWEEP for all. As mama sweep --retry, for these points alone.
    """
    from mama.jobs.actions import folders, retry

    for line in retry(folders(points)):
        click.echo(line)
