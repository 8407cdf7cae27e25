"""`mama bench ...`: the benchmarks. They import what they call when they run: `mama --help` answers at once."""

from __future__ import annotations

import os
from pathlib import Path

import click

from mama.cli.options import complete_config, configured, overrides_argument


@click.group()
def bench() -> None:
    """Measure the speed and memory of this machine."""


@bench.command("pack")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
@click.option("--rows", default=(50_000, 500_000), show_default=True, multiple=True, help="Rows of the label tables.")
def bench_pack(rounds: int, rows: tuple[int, ...]) -> None:
    """Packing: images a second, workers, joins of label tables.

    Measured on RLE and JPEG 2000 images, and compared with a naive loop.
    """
    from shards.bench import bench_pack as run

    for line in run(rounds, rows):
        click.echo(line)


@bench.command("loss")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
@click.option("--pairs", default=36, show_default=True, type=click.IntRange(min=1), help="Texts, and images.")
def bench_loss(rounds: int, pairs: int) -> None:
    """Local loss term at its published size, forward and backward.

    Compared with a loop over texts.
    """
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
    help="Also the step in transformers, peft and PyTorch alone: optimised, and as in the published code.",
)
def bench_step(config: str | None, overrides: tuple[str, ...], rounds: int, plain: bool) -> None:
    """Training step: pairs a second and peak memory of one rank.

    Steps of CONFIG on synthetic pairs. Without CONFIG: the published shapes on a GPU, tiny ones on the CPU.
    """
    from mama.bench.step import bench_step as run

    for line in run(configured(config, overrides) if config else None, rounds, plain):
        click.echo(line)


@bench.command("checkpoint")
@click.option("--sizes", default=(0.2,), show_default=True, multiple=True, help="Billions of parameters.")
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(min=1), help="Processes on this machine.")
@click.option("--stages", default=(2, 3), show_default=True, multiple=True, type=click.IntRange(1, 3), help="Of ZeRO.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Saves; medians are printed.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where they are written.")
def bench_checkpoint(
    sizes: tuple[float, ...], ranks: int, stages: tuple[int, ...], rounds: int, folder: Path | None
) -> None:
    """Checkpoints: how long all ranks stand still, and memory.

    Of a fully tuned model with random weights; beside DeepSpeed's own.
    """
    from mama.bench.checkpoint import bench_checkpoint as run

    for line in run(sizes, ranks, stages, rounds, folder):
        click.echo(line)


@bench.command("consolidate")
@click.option("--sizes", default=(0.2,), show_default=True, multiple=True, help="Billions of parameters.")
@click.option("--stage", default=2, show_default=True, type=click.IntRange(1, 3), help="Of ZeRO.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
@click.option("--folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where they are written.")
def bench_consolidate(sizes: tuple[float, ...], stage: int, rounds: int, folder: Path | None) -> None:
    """Consolidation: time and peak memory.

    Of a fully tuned model with random weights; beside DeepSpeed's zero_to_fp32.
    """
    from mama.bench.consolidate import bench_consolidate as run

    for line in run(sizes, stage, rounds, folder):
        click.echo(line)


@bench.command("load")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
def bench_load(rounds: int) -> None:
    """Data loading: pairs a second, from JPEG shards to batches.

    Images are decoded and letterboxed, reports written and tokenised.
    """
    from mama.bench.load import bench_load as run

    for line in run(rounds):
        click.echo(line)


@bench.command("intervals")
@click.option("--rounds", default=500, show_default=True, type=click.IntRange(min=1), help="Evaluations per setting.")
@click.option("--resamples", default=300, show_default=True, type=click.IntRange(min=2), help="As eval.bootstrap.")
def bench_intervals(rounds: int, resamples: int) -> None:
    """Intervals: coverage, mean length; comparisons: false alarms.

    Measured over simulated evaluations, whose true values are known.
    """
    from mama.bench.intervals import bench_intervals as run

    for line in run(rounds, resamples):
        click.echo(line)


@bench.command("predict")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Runs; medians are printed.")
def bench_predict(model: Path, rounds: int) -> None:
    """From DICOM files to scores, with a model of yours.

    Compared with decoding alone plus the forward pass alone.
    """
    from mama.predict.bench import bench_predict as run

    for line in run(model, rounds, len(os.sched_getaffinity(0))):
        click.echo(line)
