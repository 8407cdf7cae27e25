"""`mama eval` and `mama report`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import click

from mama.cli.options import Verb, config_arguments, configured, job_options, run_or_submit


@click.command("eval", cls=Verb)
@config_arguments
@job_options
def evaluate(config: str, overrides: tuple[str, ...], as_job: bool, profile: str) -> None:
    """Evaluate a run on held-out patients: zero-shot, linear probe.

    With finetune in eval.protocols the image tower is fine-tuned for each task first, or what is missing of it.

    Needs the folder model/ that mama consolidate writes. Under torchrun, srun or --slurm the tasks share the images.
    """
    from mama.finetune.fine_tune import evaluate as run

    settings = configured(config, overrides)
    folder = settings.run_folder
    run_or_submit(run, settings, folder, config=settings, as_job=as_job, profile=profile, tasks_share=True)


@click.command(cls=Verb)
@config_arguments
def report(config: str, overrides: tuple[str, ...]) -> None:
    """Write report.html of a run, or of a sweep with all its runs.

    Reads what training and evaluation left in runs/<name>/, and writes there. CONFIG may also be a sweep: its YAML
    file, its folder, or its name if no recipe has it. Its table over all points is printed too, and written as
    Markdown and CSV.
    """
    from mama.sweep.recognised import is_sweep

    if is_sweep(config):
        from mama.compare.report import write_report as write_sweep_report
        from mama.sweep.definition import load_sweep

        files, table = write_sweep_report(load_sweep(config, overrides))
        click.echo("\n".join([table, "", *map(str, files)]))
        return
    from mama.report.page import write_report

    settings = configured(config, overrides)
    click.echo(write_report(settings, settings.run_folder))
