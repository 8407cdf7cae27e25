"""`mama eval` and `mama report`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import json

import click

from mama.cli.options import Verb, config_arguments, configured_model, importing, job_options, run_or_submit
from mama.errors import ConfigError


@click.command("eval", cls=Verb)
@config_arguments
@job_options
@click.option("--on", multiple=True, metavar="SHARDS", help="Other shards, as eval.on; for several repeat it.")
def evaluate(config: str, overrides: tuple[str, ...], as_job: bool, profile: str, on: tuple[str, ...]) -> None:
    """Evaluate a run on held-out patients: zero-shot, linear probe.

    With finetune in eval.protocols the image tower is fine-tuned for each task first, or what is missing of it.

    Needs the folder model/ that mama consolidate writes; CONFIG may also be such a folder by itself, with --on. Prints
    the figures of each task when they are there. Under torchrun, srun or --slurm the tasks share the images.
    """
    with importing():
        from mama.evaluate.box_files import read_box_files
        from mama.evaluate.tasks import load_tasks
        from mama.finetune.fine_tune import evaluate as run

    overrides += (f"eval.on={json.dumps(on, ensure_ascii=False)}",) if on else ()
    settings, model = configured_model(config, overrides)
    if model != settings.run_folder and not settings.eval.on:
        raise ConfigError(f"{config}: is a model folder by itself; name shards to evaluate it on: --on SHARDS")
    load_tasks(settings.eval.tasks)  # a mistake in a file is told before a job waits in a queue
    read_box_files(settings.eval.boxes)
    run_or_submit(run, settings, model, click.echo, config=settings, as_job=as_job, profile=profile, tasks_share=True)


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

    settings, model = configured_model(config, overrides)
    click.echo(write_report(settings, settings.run_folder, model))
