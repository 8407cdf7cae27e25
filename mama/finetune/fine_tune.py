"""Fine-tune the image tower of a consolidated model for each task, fraction and draw that an evaluation asks for.

Each has a folder below `<run>/finetune/`, or below `<run>/finetune-on/` for other shards than those of pre-training:
`finetune.json` says what it is, `log.jsonl` and `tensorboard/` are its curves, `classifier/` is the result, and
`complete.json`, written last, says that it is done. Its checkpoints are deleted then. All that are not done are done
one after the other, by ranks that meet once.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mama.data.held_out import Item, Split
from mama.errors import ConfigError, StoppedError
from mama.evaluate import box_files, fractions, provenance
from mama.evaluate.evaluation import Show
from mama.evaluate.fine_tuned import CLASSIFIER, MARKER, Tuning, digest_of, folder_of, is_complete
from mama.evaluate.results import Results
from mama.evaluate.sets import evaluate_sets, require_sets, sets_of
from mama.evaluate.tasks import Task, load_tasks
from mama.export.classifier_folder import Named, new_classifier, save_classifier, tokens_of
from mama.export.model_folder import is_bare
from mama.finetune.fine_tuning import FineTuning
from mama.finetune.labels import Labels, items_of, labels_of
from mama.finetune.optimizer import optimizer_of
from mama.finetune.settings import settings_of_group, settings_of_one
from mama.model import attention
from mama.model.blocks import prepare_image_tower
from mama.run import checkpoints
from mama.run.checkpoint_marker import read_marker
from mama.run.files import make_folder, read_object, remove, replace_folder, write_json
from mama.run.kept_settings import flat
from mama.run.model_state import digests
from mama.runtime import preemption
from mama.runtime.collectives import barrier, rank, world_size
from mama.runtime.launch import is_rank, run_on_ranks
from mama.settings.paper import resolved
from mama.settings.schema import Config
from mama.train import checkpoint
from mama.train.agreement import prepare_and_agree
from mama.train.capacity import decided, require_capacity
from mama.train.deepspeed_engine import start_engine
from mama.train.estimate import classifier_bytes
from mama.train.heartbeat import Heartbeat
from mama.train.lease import Lease
from mama.train.loop import Training, Work, goes_on_later, on_rank

log = logging.getLogger(__name__)

IDENTITY = "finetune.json"
NO_MATTER = ("micro_batch", "save_every")  # settings of `finetune` that decide nothing that is computed
NOTHING = "its training images are of one class, or have no label"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """A fine-tuning on one set of shards; `config` are the settings of the evaluation of that set."""

    tuning: Tuning
    config: Config
    place: Path  # the folder that its own folder is in
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.place / self.tuning.name


def evaluate(config: Config, run: Path, show: Show | None = None) -> dict[str, Results]:
    """What `mama eval` does: the fine-tunings that are not done, if it is to show any, and then the evaluation.

    Returns and raises as `mama.evaluate.sets.evaluate_sets` does, and as `fine_tune`; {} if the job goes on later.
    """
    config = resolved(config)
    if "finetune" in config.eval.protocols and is_bare(run):
        raise ConfigError(f"eval.protocols: finetune writes into a run, and {run} is a model folder by itself")
    require_sets(config)
    sets = list(sets_of(config).values())
    for one in sets if config.eval.boxes else ():
        box_files.marks(one, Split(one, one.eval.split))  # a mistake is told before anything is computed
    if not fine_tune(sets, run):
        return {}
    return evaluate_sets(config, run, show)


def fine_tune(sets: Sequence[Config], run: Path) -> bool:
    """Do all fine-tunings that the evaluations `sets` ask for and that are not done.

    Returns False if a signal came, and the job is back in the queue. Every task that a launcher started must call it:
    they are the ranks, and meet once for all sets of shards. Otherwise `train.ranks` are started here.
    Raises `StoppedError` if a signal ended it, with everything saved; `ConfigError` if one was begun with other
    settings, weights or shards.
    """
    jobs = [job for config in sets for job in jobs_of(config, run)]
    for job in jobs:
        require_same(job.identity, job.folder)
    if all(is_complete(job.folder) for job in jobs):
        return True
    own_rank = is_rank()
    model = run / "model"
    group = settings_of_group(jobs[0].config, model, run / "finetune")
    if not own_rank:
        require_capacity(group)
    try:
        if not run_on_ranks(partial(_on_this_rank, jobs, model), group):
            raise StoppedError("a signal ended the fine-tuning, and all is saved; run it again to continue")
    except StoppedError as error:
        if not goes_on_later(error):
            raise
        return False
    return True


def jobs_of(config: Config, run: Path) -> list[Job]:
    """The fine-tunings of an evaluation, task by task: none if it shows none, or its shards have no training images."""
    if "finetune" not in config.eval.protocols or config.eval.split == "train":
        return []
    shards, model = provenance.shard_set(config), provenance.model_of(run)
    if model is None:
        raise ConfigError(f"{run / 'model'}: no model; run `mama consolidate` first")
    if not any(row["split"] == "train" for folder in shards["folders"] for row in folder["splits"]):
        log.warning("%s: have no training images: nothing is fine-tuned on them", ", ".join(config.data.shards))
        return []
    place = folder_of(shards, run)
    tasks, draws = load_tasks(config.eval.tasks), list(fractions.draws(config.eval))
    found = {Tuning(task.name, *draw): task for task in tasks for draw in draws}
    return [Job(tuning, config, place, identity(tuning, task, config, shards, model)) for tuning, task in found.items()]


def identity(
    tuning: Tuning, task: Task, config: Config, shards: provenance.Document, model: provenance.Document
) -> dict[str, Any]:
    """What decides the result of a fine-tuning, as a JSON object."""
    own = {key: value for key, value in asdict(config.finetune).items() if key not in NO_MATTER}
    data = {"image_size": config.data.image_size, "fit": config.data.fit, "augment": asdict(config.data.augment)}
    train = {"precision": config.train.precision, "betas": config.optim.betas}
    settings = {"seed": config.seed, "finetune": own, "data": data, "train": train}
    labels = {"label": task.label, "classes": task.classes, "images": task.images}
    found = {**asdict(tuning), **labels, **settings, "shards": digest_of(shards), "model": model["sha256"]}
    as_written: dict[str, Any] = json.loads(json.dumps(found))  # lists in place of tuples
    return as_written


def require_same(own: dict[str, Any], folder: Path) -> None:
    """Raise `ConfigError` if the fine-tuning in `folder` has come to something, and is another one than `own`."""
    begun = (folder / IDENTITY).exists() and (is_complete(folder) or checkpoints.checkpoints(folder))
    if not begun:
        return
    before, now = flat(read_object(folder / IDENTITY)), flat(own)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {now.get(key)!r}, but {folder} was fine-tuned with {before.get(key)!r}; give the value that "
                "it had, or remove that folder to fine-tune again"
            )


def _on_this_rank(jobs: Sequence[Job], model: Path, group: Config) -> bool:
    """Do all on this rank; False if a signal came before the end."""

    def prepare(device: torch.device, lease: Lease | None, heartbeat: Heartbeat) -> Work[bool]:
        return _Tunings(jobs, model, device, lease, heartbeat).run

    return on_rank(group, prepare)


class _Tunings:
    """All fine-tunings of an evaluation on one rank, and what they share."""

    def __init__(
        self, jobs: Sequence[Job], model: Path, device: torch.device, lease: Lease | None, heartbeat: Heartbeat
    ) -> None:
        self.jobs, self.model = jobs, model
        self.device, self.lease, self.heartbeat = device, lease, heartbeat
        self.read: tuple[list[str], list[Item], list[Item]] = ([], [], [])  # shards, images of train and of val

    def run(self) -> bool:
        for number, job in enumerate(self.jobs):
            one = settings_of_one(job.config, job.tuning, self.model, job.place)
            done, labels = self._labels(job)
            if done:
                continue
            if labels is None:
                log.warning("%s: not fine-tuned: %s", job.tuning.name, NOTHING)
                self._finish(job, {"reason": NOTHING})
                continue
            log.info("fine-tuning %s: %s", job.tuning.name, labels.counts())
            with preemption.ending_at_once():
                training = self._start(one, labels, job, before=number * one.train.steps)
            taken = training.run()
            if taken < one.train.steps and not training.method.stops(taken):
                return False
            self.heartbeat.doing(f"writing the classifier of {job.tuning.name}")
            training.engine.destroy()
            del training
            gc.collect()
            self._finish(job, self._write(one, labels) if rank() == 0 else {})
        return True

    def _labels(self, job: Job) -> tuple[bool, Labels | None]:
        """Whether a fine-tuning is done, and its labels: what rank 0 sees."""
        self.heartbeat.doing("reading the labels")
        found: list[tuple[bool, Labels | None]] = [(False, None)]
        if rank() == 0:
            done = is_complete(job.folder)
            found = [(done, None if done else labels_of(job.tuning, *self._items(job.config), job.config))]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def _items(self, config: Config) -> tuple[list[Item], list[Item]]:
        """All images of train, and of val if they are to be looked at; those of one set of shards are kept."""
        if self.read[0] != config.data.shards:
            val = items_of(config, "val") if config.finetune.validate_every else []
            self.read = config.data.shards, items_of(config, "train"), val
        return self.read[1:]

    def _start(self, one: Config, labels: Labels, job: Job, before: int) -> Training:
        """Build the classifier and start its engine, from the newest checkpoint if there is one."""
        self.heartbeat.doing(f"preparing {one.name}")
        resumed = prepare_and_agree(one, partial(_prepare, job.identity))
        kernel = attention.choose(one.train.attention, self.device, tokens_of(self.model) == "tissue")
        model = new_classifier(self.model, len(labels.classes), kernel)
        one = decided(one, classifier_bytes(one, model, world_size()), self.device)
        prepare_image_tower(model.vision, one.train, self.device)
        frozen = digests(model)
        if resumed:
            checkpoints.load_weights(model, resumed, frozen)
        engine = start_engine(model, one, optimizer_of(model, one))
        if resumed:
            checkpoint.load_optimizer(engine, resumed)
            log.info("resumed from %s", resumed)
        return Training(one, FineTuning(one, engine, labels, frozen), resumed, self.lease, self.heartbeat, before)

    def _write(self, one: Config, labels: Labels) -> dict[str, Any]:
        """Write the classifier of the best step, or of the last one; returns what its marker says. On rank 0."""
        folder = one.run_folder
        chosen = checkpoints.best_whole(folder) if one.train.validate_every else checkpoints.newest(folder)
        assert chosen is not None
        model = new_classifier(self.model, len(labels.classes), attention.choose("sdpa", CPU))
        checkpoints.load_weights(model, chosen, digests(model))
        partial_folder = folder / f"{CLASSIFIER}.partial"
        remove(partial_folder)
        save_classifier(Named(model, labels.classes), self.model, partial_folder)
        replace_folder(partial_folder, folder / CLASSIFIER)
        marker = read_marker(chosen)
        return {"step": marker.step, "val_loss": None if marker.score is None else -marker.score, **labels.counts()}

    def _finish(self, job: Job, document: dict[str, Any]) -> None:
        """Mark a fine-tuning as done, and delete its checkpoints; every rank must call it."""
        if rank() == 0:
            if self.lease:
                self.lease.check()
            make_folder(job.folder)
            write_json(job.folder / IDENTITY, job.identity)
            write_json(job.folder / MARKER, document)
            remove(job.folder / "checkpoints")
        barrier()


def _prepare(own: dict[str, Any], one: Config) -> Path | None:
    """Prepare the folder of a fine-tuning, and return the checkpoint to resume from, if there is one."""
    folder = one.run_folder
    make_folder(folder / "checkpoints")
    require_same(own, folder)
    resumed = checkpoints.newest(folder)
    if not resumed:
        write_json(folder / IDENTITY, own)
    return resumed
