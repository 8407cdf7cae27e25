"""What the verbs share: the CONFIG argument, its key=value changes, and the options of jobs."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mama.errors import ConfigError
from mama.run.checkpoint_marker import STEP
from mama.run.files import named, surviving
from mama.run.kept_settings import recorded, require_own_model
from mama.run.model_place import MEANT, require_place
from mama.run.portable import MODEL
from mama.runtime import console
from mama.settings.load import is_shipped, load, load_profile, load_run, setting_for, shipped_configs
from mama.settings.schema import Config
from slurm.queue import waits_for_ever
from slurm.task import first_task

log = logging.getLogger(__name__)
T = TypeVar("T")

LEFT_TO_FIRST = "this is the work of one task: it is left to the first one of this step (SLURM_PROCID is not 0)"

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)
BYTES = {"B": 1, "IB": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}}
BYTES |= {f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)}


class Verb(click.Command):
    """A command whose error for an unknown option explains how to write settings."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse the words behind the verb. Raises `click.UsageError`."""
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            if not any(parameter.name == "overrides" for parameter in self.params):
                raise
            near = [name for name in error.possibilities or () if name != "--help"]
            message = click.NoSuchOption(error.option_name, possibilities=near).format_message()
            raise click.UsageError(f"{message} {setting_for(error.option_name)}", context) from error


def complete_config(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of CONFIG: the shipped recipes, then files."""
    names = sorted(path.stem for path in shipped_configs().glob("*.yaml"))
    recipes = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*recipes, CompletionItem(incomplete, type="file")]


_CONFIG = click.argument("config", shell_complete=complete_config)
overrides_argument = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
_SLURM = click.option("--slurm", "as_job", is_flag=True, help="Submit a job (submitit) instead of running here.")
_PROFILE = click.option(
    "--profile",
    default="local",
    show_default=True,
    help="With --slurm: where the job runs, with which resources; a YAML file, or the name of a shipped one.",
)


def config_arguments(function: Callable[..., None]) -> Callable[..., None]:
    """CONFIG [KEY=VALUE]..., for `configured`."""
    return _CONFIG(overrides_argument(function))


def job_options(function: Callable[..., None]) -> Callable[..., None]:
    """--slurm and --profile, for `run_or_submit`."""
    return _SLURM(_PROFILE(function))


def configured(path: str, overrides: tuple[str, ...]) -> Config:
    """Load the configuration that a CONFIG argument and its key=value changes name. Raises `ConfigError`.

    A run folder is its own run, wherever it was moved to: the paths in its config.yaml may lead to another run, whose
    files would be read, overwritten or deleted. A folder that is no run does not hide a shipped recipe of its name, as
    mama/ would in a checkout.
    """
    folder = Path(path)
    if "=" in path and not folder.exists():
        raise ConfigError(f"{path}: settings follow CONFIG, for example quickstart {path}")
    if not folder.is_dir() or (not (folder / "config.yaml").exists() and is_shipped(path)):
        return load(path, overrides)
    folder = named(folder)
    if (name := load_run(folder).name) != folder.name:
        file = folder / "config.yaml"
        raise ConfigError(f"{folder}: its config.yaml is of the run {name!r}; rename the folder, or give {file} itself")
    return load_run(folder, (f"runs={folder.parent}", *overrides))


def configured_model(path: str, overrides: tuple[str, ...]) -> tuple[Config, Path]:
    """The configuration that MODEL and its changes name, and where its model is: a run folder, or a model folder.

    The results of a model folder by itself go into a run folder beside it, <its name>-eval. Raises `ConfigError`.
    """
    if not path.strip():
        raise ConfigError(f"{path!r} names no model; {MEANT}")
    folder = named(Path(path))
    model = surviving(folder)
    is_config = folder.suffix in (".yaml", ".yml") or is_shipped(path)
    if model.exists() and not is_config:
        require_place(model)
    if not (model / MODEL).is_file():
        config = configured(path, overrides)
        require_own_model(config.run_folder, overrides)
        return config, config.run_folder
    if not (model / "config.yaml").is_file():
        raise ConfigError(f"{folder}: has no config.yaml; copy the whole folder model/ that `mama consolidate` wrote")
    beside = (f"runs={folder.parent}", f"name={folder.name}-eval")
    require_own_model(model, overrides)
    return load(model / "config.yaml", (*beside, *overrides)), model


def configured_checkpoint(path: str, overrides: tuple[str, ...]) -> tuple[Config, int | None]:
    """The settings that the run of CONFIG was trained with, and the step if CONFIG is a checkpoint of a run.

    The folder of a checkpoint need not be there. Raises `ConfigError`, also for a checkpoint that lies in no run, for a
    model folder, and for changes that would describe the model wrongly.
    """
    folder = named(Path(path))
    if (surviving(folder) / MODEL).is_file():
        raise ConfigError(f"{path}: is a model folder already; name its run, or a checkpoint")
    found = STEP.fullmatch(folder.name)
    place = folder if folder.parent.parent.name else folder.absolute()
    run = place.parent.parent
    in_run = place.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    if not found or not (folder.is_dir() or in_run):
        return recorded(configured(path, overrides), overrides), None
    if not in_run:
        raise ConfigError(f"{path}: is a checkpoint outside of its run; move it back to RUN/checkpoints/{folder.name}")
    return recorded(configured(str(run), overrides), overrides), int(found[1])


def size_in_bytes(option: str, size: str) -> int:
    """Bytes of a size such as 4GB or 500MiB. Raises `ConfigError` for anything else."""
    found = SIZE.fullmatch(size.strip())
    count = int(float(found[1]) * BYTES[found[2].upper()]) if found else 0
    if count < 1:
        raise ConfigError(f"{option}: {size!r} is no size; write it as 4GB or 500MB")
    return count


@contextmanager
def importing() -> Iterator[None]:
    """A block that imports torch and transformers: without garbage collection, which takes a sixth less time.

    What it has imported is there to stay, so later collections, and that at the end of the process, leave it out.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_or_submit(
    function: Callable[..., T], *arguments: Any, config: Config, as_job: bool, profile: str, tasks_share: bool = False
) -> T | None:
    """Call `function(*arguments)` here and return its result, or submit the same call as a job and print its log.

    If the profile has several tasks, all of them call a function whose work `tasks_share`; any other is called in the
    first task alone. Of several tasks that `srun` started, the first alone submits.

    Raises `ConfigError` or `SlurmError` if it cannot be submitted.
    """
    if not as_job:
        return function(*arguments)
    if is_left_to_first_task():
        return None
    from mama.run.environment import copy_code  # torch and submitit take a while to import
    from slurm.submit import submit

    name, resources = f"{config.name}-{function.__name__}", load_profile(profile)
    folder = config.run_folder
    code = copy_code(folder / "code") if resources.cluster == "slurm" else None
    call = (call_in_task, function, arguments, tasks_share)
    job = submit(*call, profile=resources, folder=folder, name=name, code=code)
    click.echo(f"job {job.job_id} submitted; its log: {job.paths.stdout}")
    if resources.cluster == "slurm":
        tell_if_it_never_starts(job.job_id, profile)
    return None


def is_left_to_first_task() -> bool:
    """Whether `srun` started several tasks and this is not the first one, which logs that it has nothing to do."""
    if first_task():
        return False
    log.info(LEFT_TO_FIRST)
    return True


def call_in_task(function: Callable[..., T], arguments: tuple[Any, ...], tasks_share: bool) -> T | None:
    """In each task of a job: `function(*arguments)`, or nothing if another task does all the work."""
    console.configure_logging()
    return function(*arguments) if tasks_share or first_task() else None


def tell_if_it_never_starts(number: str, profile: str) -> None:
    """Say why a job that was just submitted will wait for ever. It stays in the queue: a node may come back."""
    if why := waits_for_ever(number):
        what = f"`scancel {number}`, change the profile {profile}, and submit again"
        click.echo(f"job {number} will wait for ever: {why}; {what}", err=True)
