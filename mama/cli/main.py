"""The command line: `mama VERB CONFIG-or-PATH [key=value ...]`."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import click
import click.shell_completion

from mama.cli import bench, cluster, data, evaluate, jobs, predict, train
from mama.cli.options import Verb
from mama.errors import ConfigError, RankError, StoppedError, TrainingError
from mama.runtime import console, preemption
from shards.errors import ShardError
from slurm.profile import SlurmError

# A disk that is full, damaged, read-only or gone.
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP)
@click.version_option(package_name="mama-clip")
@click.pass_context
def cli(context: click.Context) -> None:
    """Mammography vision-language pre-training, from DICOM archives to evaluated models.

    CONFIG is a YAML file, the name of a shipped recipe (quickstart, cdd_cesm, ...), or the folder of an existing run.
    key=value behind it changes any setting, for example train.steps=100.
    """
    console.configure_logging()
    if context.invoked_subcommand != "train":  # which imports for seconds, then installs handlers of its own
        preemption.restore_default_handlers()


@click.command(cls=Verb)
@click.option("--runs", default="runs", show_default=True, help="Folder for the run and its shards.")
@click.option("--seed", default=0, show_default=True, help="Seed of the training run.")
def quickstart(runs: str, seed: int) -> None:
    """Run every stage on synthetic and sample data: pack to report."""
    from mama.quickstart import quickstart as run  # imports torch

    click.echo(run(Path(runs), seed))


@click.command(cls=Verb)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    In bash: eval "$(mama completion bash)".
    """
    script = click.shell_completion.get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "mama", "_MAMA_COMPLETE").source())


for verb in (
    *(quickstart, data.pack, data.check, train.train, train.consolidate, evaluate.evaluate, evaluate.report),
    *(predict.predict, predict.embed, cluster.sweep, jobs.jobs, bench.bench, completion),
):
    cli.add_command(verb)


def main() -> None:
    """Run the command line.

    Exit code 2: the user's mistake; 1: the run failed; 75: it can be continued, as a signal stopped it
    or it hung once.
    """
    try:
        cli(prog_name="mama")
    except (ConfigError, ShardError, SlurmError) as error:
        _exit(console.printable(str(error)), 2)
    except OSError as error:
        if error.filename is not None:
            _exit(console.printable(f"{error.filename}: {error.strerror}"), 2)
        if error.errno not in OF_DISKS:
            raise
        _exit(f"a file could not be read or written: {error.strerror}", 2)
    except StoppedError as error:
        _exit(str(error), preemption.EXIT_CODE)
    except (RankError, TrainingError) as error:
        _exit(str(error), 1)


def _exit(message: str, code: int) -> None:
    click.echo(f"mama: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
