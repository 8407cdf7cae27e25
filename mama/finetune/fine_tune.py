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
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mama.errors import ConfigError, StoppedError
from mama.evaluate import fractions, provenance
from mama.evaluate.evaluation import Show
from mama.evaluate.fine_tuned import CLASSIFIER, MARKER, Tuning, digest_of, folder_of, is_complete
from mama.evaluate.results import Results
from mama.evaluate.sets import evaluate_sets, sets_of
from mama.export.classifier_folder import Named, new_classifier, save_classifier
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
from mama.train.capacity import require_capacity
from mama.train.deepspeed_engine import start_engine
from mama.train.heartbeat import Heartbeat
from mama.train.lease import Lease
from mama.train.loop import Training, Work, goes_on_later, on_rank

log = logging.getLogger(__name__)

IDENTITY = "finetune.json"
NO_MATTER = ("micro_batch", "save_every")  # settings of `finetune` that decide nothing that is computed
NOTHING = "its training images are of one class, or have no label"
CPU = torch.device("cpu")


def evaluate(config: Config, run: Path, show: Show | None = None) -> dict[str, Results]:
    """What `mama eval` does: the fine-tunings that are not done, if it is to show any, and then the evaluation.

    Returns and raises as `mama.evaluate.sets.evaluate_sets` does, and as `fine_tune`; {} if the job goes on later.
    """
    config = resolved(config)
    if "finetune" in config.eval.protocols and config.eval.split != "train":
        if is_bare(run):
            raise ConfigError(f"eval.protocols: finetune writes into a run, and {run} is a model folder by itself")
        if not all(fine_tune(one, run) for one in sets_of(config).values()):
            return {}
    return evaluate_sets(config, run, show)


def fine_tune(config: Config, run: Path) -> bool:
    """Do all fine-tunings of `config` that are not done; False if a signal came, and the job is back in the queue.

    Every task that a launcher started must call it: they are the ranks. Otherwise `train.ranks` are started here.
    Raises `StoppedError` if a signal ended it, with everything saved; `ConfigError` if one was begun with other
    settings, weights or shards.
    """
    shards, model = provenance.shard_set(config), provenance.model_of(run)
    if model is None:
        raise ConfigError(f"{run / 'model'}: no model; run `mama consolidate` first")
    place = folder_of(shards, run)
    found = {tuning: identity(tuning, config, shards, model) for tuning in tunings(config)}
    for tuning, own in found.items():
        require_same(own, place / tuning.name)
    if all(is_complete(place / tuning.name) for tuning in found):
        return True
    own_rank = is_rank()
    group = settings_of_group(config, run / "model", place)
    if not own_rank:
        require_capacity(group)
    try:
        if not run_on_ranks(partial(_on_this_rank, config, run / "model", found), group):
            raise StoppedError("a signal ended the fine-tuning, and all is saved; run it again to continue")
    except StoppedError as error:
        if not goes_on_later(error):
            raise
        return False
    return True


def tunings(config: Config) -> Iterator[Tuning]:
    """The fine-tunings of an evaluation, task by task."""
    for task in config.eval.tasks:
        yield from (Tuning(task, *draw) for draw in fractions.draws(config.eval))


def identity(tuning: Tuning, config: Config, shards: provenance.Document, model: provenance.Document) -> dict[str, Any]:
    """What decides the result of a fine-tuning, as a JSON object."""
    own = {key: value for key, value in asdict(config.finetune).items() if key not in NO_MATTER}
    data = {"image_size": config.data.image_size, "fit": config.data.fit, "augment": asdict(config.data.augment)}
    train = {"precision": config.train.precision, "betas": config.optim.betas}
    settings = {"seed": config.seed, "finetune": own, "data": data, "train": train}
    found = {**asdict(tuning), **settings, "shards": digest_of(shards), "model": model["sha256"]}
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


def _on_this_rank(config: Config, model: Path, found: dict[Tuning, dict[str, Any]], group: Config) -> bool:
    """Do all on this rank; False if a signal came before the end."""

    def prepare(device: torch.device, lease: Lease | None, heartbeat: Heartbeat) -> Work[bool]:
        return _Tunings(config, model, found, group, device, lease, heartbeat).run

    return on_rank(group, prepare)


class _Tunings:
    """All fine-tunings of an evaluation on one rank, and what they share."""

    def __init__(
        self,
        config: Config,
        model: Path,
        found: dict[Tuning, dict[str, Any]],
        group: Config,
        device: torch.device,
        lease: Lease | None,
        heartbeat: Heartbeat,
    ) -> None:
        self.config, self.model, self.found, self.group = config, model, found, group
        self.device, self.lease, self.heartbeat = device, lease, heartbeat
        heartbeat.doing("reading the labels")
        if rank() == 0:  # the others get the draws from it
            self.train = items_of(config, "train")
            self.val = items_of(config, "val") if config.finetune.validate_every else []

    def run(self) -> bool:
        for number, (tuning, own) in enumerate(self.found.items()):
            one = settings_of_one(self.group, tuning, self.config)
            done, labels = self._labels(tuning, one)
            if done:
                continue
            if labels is None:
                log.warning("%s: not fine-tuned: %s", tuning.name, NOTHING)
                self._finish(one, own, {"reason": NOTHING})
                continue
            log.info("fine-tuning %s: %s", tuning.name, labels.counts())
            with preemption.ending_at_once():
                training = self._start(one, labels, own, before=number * one.train.steps)
            taken = training.run()
            if taken < one.train.steps and not training.method.stops(taken):
                return False
            self.heartbeat.doing(f"writing the classifier of {tuning.name}")
            training.engine.destroy()
            del training
            gc.collect()
            self._finish(one, own, self._write(one, labels) if rank() == 0 else {})
        return True

    def _labels(self, tuning: Tuning, one: Config) -> tuple[bool, Labels | None]:
        """Whether a fine-tuning is done, and its labels: what rank 0 sees."""
        found: list[tuple[bool, Labels | None]] = [(False, None)]
        if rank() == 0:
            done = is_complete(one.run_folder)
            found = [(done, None if done else labels_of(tuning, self.train, self.val, self.config))]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def _start(self, one: Config, labels: Labels, own: dict[str, Any], before: int) -> Training:
        """Build the classifier and start its engine, from the newest checkpoint if there is one."""
        self.heartbeat.doing(f"preparing {one.name}")
        resumed = prepare_and_agree(one, partial(_prepare, own))
        kernel = attention.choose(one.train.attention, self.device)
        model = new_classifier(self.model, len(labels.classes), kernel)
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

    def _finish(self, one: Config, own: dict[str, Any], document: dict[str, Any]) -> None:
        """Mark a fine-tuning as done, and delete its checkpoints; every rank must call it."""
        if rank() == 0:
            if self.lease:
                self.lease.check()
            make_folder(one.run_folder)
            write_json(one.run_folder / IDENTITY, own)
            write_json(one.run_folder / MARKER, document)
            remove(one.run_folder / "checkpoints")
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
