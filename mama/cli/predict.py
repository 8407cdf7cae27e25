"""`mama predict` and `mama embed`. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from mama.cli.options import Verb, configured_model, importing, job_options, run_or_submit
from mama.settings.schema import Config

SOME_REFUSED = 3  # exit code: some inputs were refused, and the rest was used


def _inputs(function: Callable[..., None]) -> Callable[..., None]:
    """MODEL INPUT..., and how the inputs are read."""
    for option in (
        click.option("--base", metavar="NAME", help="Language model of a folder with an adapter; else by its name."),
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            help="Processes that decode images; 0: none besides this one. Else one for each core.",
        ),
        click.option("--split", metavar="NAME", help="Of shards: train, val or test alone."),
        click.option("--for-processing", is_flag=True, help="Also raw images (FOR PROCESSING), rendered for display."),
        job_options,
        click.argument("inputs", nargs=-1, required=True, metavar="INPUT..."),
        click.argument("model", type=click.Path()),
    ):
        function = option(function)
    return function


@click.command(cls=Verb)
@_inputs
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="predictions",
    show_default=True,
    help="Folder of the results; that of an earlier prediction is replaced.",
)
@click.option("--task", "tasks", multiple=True, metavar="NAME|FILE", help="Shipped task or YAML file; repeatable.")
@click.option("--ask", multiple=True, metavar="TEXT", help="A sentence of your own: cosine, heat map; repeatable.")
@click.option("--pool", type=click.Choice(["mean", "max"]), default="mean", show_default=True, help="Of images.")
@click.option("--html", is_flag=True, help="Also a page for each exam.")
@click.option("--neighbours", metavar="SHARDS", help="With --html: the nearest images in these shards.")
def predict(
    model: str,
    inputs: tuple[str, ...],
    out: Path,
    tasks: tuple[str, ...],
    ask: tuple[str, ...],
    pool: str,
    html: bool,
    neighbours: str | None,
    for_processing: bool,
    split: str | None,
    workers: int | None,
    base: str | None,
    as_job: bool,
    profile: str,
) -> None:
    """Score image files by exam; heat maps, pages.

    MODEL is a run folder or a model folder. INPUT is an image file (DICOM, PNG, JPEG, TIFF), a folder of them, a CSV
    table with a column image (and patient, study, laterality, view), or a folder of shards. Writes predictions.json and
    three tables. Exit code 3: some inputs were refused, and each is named with the reason. Not for clinical use.
    """
    with importing():
        from mama.predict.predict import Request, check
        from mama.predict.predict import predict as run

    settings, folder = configured_model(model, ())
    request = Request(
        folder,
        inputs,
        out,
        tasks=tasks,
        ask=ask,
        pool="max" if pool == "max" else "mean",
        for_processing=for_processing,
        split=split,
        workers=_cores() if workers is None else workers,
        base=base,
        html=html,
        neighbours=neighbours,
    )
    if as_job:
        check(request)  # a mistake is told before a job waits in a queue
    document = run_or_submit(
        run, request, config=_job(settings, out) if as_job else settings, as_job=as_job, profile=profile
    )
    if document:
        click.echo(out)
        sys.exit(SOME_REFUSED if document["refused"] else 0)


@click.command(cls=Verb)
@_inputs
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new file, .npz or .parquet.")
def embed(
    model: str,
    inputs: tuple[str, ...],
    out: Path,
    for_processing: bool,
    split: str | None,
    workers: int | None,
    base: str | None,
    as_job: bool,
    profile: str,
) -> None:
    """Write the embeddings of image files or shards.

    MODEL and INPUT are those of mama predict. One row an image, in NumPy's format or Parquet.
    """
    with importing():
        from mama.predict.embed import EmbedRequest, check
        from mama.predict.embed import embed as run

    settings, folder = configured_model(model, ())
    count = _cores() if workers is None else workers
    request = EmbedRequest(folder, inputs, out, for_processing, split, count, base)
    if as_job:
        check(request)
    refused = run_or_submit(
        run, request, config=_job(settings, out) if as_job else settings, as_job=as_job, profile=profile
    )
    if refused is not None:
        click.echo(out)
        sys.exit(SOME_REFUSED if refused else 0)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _job(settings: Config, out: Path) -> Config:
    """The settings that name a job and the folder of its logs: beside the results."""
    return replace(settings, runs=str(out.parent), name=f"{out.name}-job")
