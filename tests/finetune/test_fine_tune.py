"""Fine-tuning by the real DeepSpeed on one and two ranks: what moves, what a resume gives, and which step is taken."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from mama.data.augment import normalise
from mama.data.held_out import Split
from mama.errors import ConfigError
from mama.evaluate import provenance
from mama.evaluate.fine_tuned import CLASSIFIER, folder_of
from mama.export.consolidate import consolidate
from mama.export.model_folder import load_model
from mama.finetune import fine_tune as module
from mama.finetune import fine_tuning
from mama.finetune.fine_tune import IDENTITY, fine_tune, jobs_of
from mama.finetune.fine_tuning import FineTuning, balanced_loss
from mama.finetune.settings import settings_of_group
from mama.model.classifier import log_probabilities
from mama.runtime import preemption
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, EvalConfig, FinetuneConfig
from mama.train.loop import on_rank
from tests.support.checkpoint_folder import weights_of
from tests.support.cohort import write_shards
from tests.support.saved_run import save_run
from tests.support.tiny_run import config_of

pytestmark = pytest.mark.ranks

STEPS = 6
LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5, 10: 0.5}  # on val, by step: after two without a better one it stops at 8


@dataclass(frozen=True)
class Case:
    """A way to fine-tune; `stop` is a step for cancer in which a signal comes, before the run is resumed."""

    name: str
    stage: Any
    own: FinetuneConfig
    stop: int | None = None
    tasks: tuple[str, ...] = ("cancer",)


OWN = FinetuneConfig(steps=STEPS, batch=4, micro_batch=1, lr=1e-2, warmup_steps=2, save_every=2, clip_norm=0.5)
SGD = replace(OWN, optimizer="sgd", lr=0.1, sampling="natural")
WATCHED = replace(OWN, steps=12, validate_every=2, patience=2)


TWO = ("density", "cancer")
CASES = {
    1: [
        Case("whole", 0, OWN, tasks=TWO),
        Case("whole-cut", 0, OWN, stop=3, tasks=TWO),
    ],
    2: [
        Case("whole", 3, OWN, tasks=TWO),
        Case("whole-cut", 3, OWN, stop=3, tasks=TWO),
        Case("sgd", 1, SGD),
        Case("sgd-cut", 1, SGD, stop=3),
        Case("watched-cut", 3, WATCHED, stop=5),
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("fine-tuning")
    write_shards(folder / "shards", {"train": 9, "val": 4, "test": 7})
    config = config_of(folder, "tuned")
    measured = EvalConfig(tasks=["density", "cancer"], protocols=["finetune"], batch=4, bootstrap=0)
    config = replace(config, eval=measured, data=replace(config.data, workers=0), finetune=OWN)
    save_run(config)
    consolidate(config)
    return config


def on_all(config: Config, of_case: list[Case], group: Config) -> None:
    """All cases on this rank, which joins once; beside each of them the checkpoints that it deletes at its end."""

    def prepare(*place: Any) -> Any:
        def work() -> None:
            for case in of_case:
                one = replace(
                    config,
                    finetune=case.own,
                    train=replace(config.train, zero_stage=case.stage),
                    eval=replace(config.eval, tasks=list(case.tasks)),
                )
                jobs = [replace(job, place=config.run_folder / case.name) for job in jobs_of(one, config.run_folder)]
                finished: list[bool] = []
                for _ in range(1 if case.stop is None else 2):
                    with patch.object(FineTuning, "step", stopping_at(case.stop if not finished else None)):
                        tuning = module._Tunings(jobs, config.run_folder / "model", *place)
                        with patch.object(module, "remove", kept), patch.object(fine_tuning, "val_loss", invented):
                            finished.append(tuning.run())
                    preemption._received = 0
                assert finished == ([True] if case.stop is None else [False, True]), case

        return work

    on_rank(group, prepare)


def stopping_at(step: int | None) -> Any:
    whole = FineTuning.step

    def stopped(self: FineTuning, batches: Any, number: int) -> bool:
        if number == step and self.config.name.startswith("cancer"):
            preemption.adopt_request(preemption.END)
        return whole(self, batches, number)

    return stopped


def kept(path: Path) -> None:
    if path.name == "checkpoints":
        path.rename(path.with_name("kept"))
    elif path.exists():
        shutil.rmtree(path)


def invented(engine: Any, config: Config, labels: Any) -> float:
    """The loss on val, as `LOSSES` has it; the real one, of all ranks, is compared with that of all images on one."""
    split, model = Split(config, "val"), engine.module
    pixels = torch.stack([split[int(row)][0] for row in labels.val_rows])
    shares = log_probabilities(model.eval(), normalise(pixels))
    model.train()
    own = torch.from_numpy(labels.val_labels)
    assert len(own) == 8
    found = real(engine, config, labels)
    assert found == pytest.approx(balanced_loss(shares, own, torch.ones(8, dtype=torch.bool)), rel=1e-5)
    return LOSSES[2 * len(list((config.run_folder / "checkpoints").iterdir()))]


real = fine_tuning.val_loss


def classifier(config: Config, case: str, tuning: str = "cancer-100-0") -> dict[str, torch.Tensor]:
    return load_file(config.run_folder / case / tuning / CLASSIFIER / "model.safetensors")


def logged(config: Config, case: str) -> list[float]:
    lines = (config.run_folder / case / "cancer-100-0" / "log.jsonl").read_text().splitlines()
    return [line["loss/total"] for line in map(json.loads, lines) if "loss/total" in line]


def start(config: Config, ranks: int) -> None:
    config = replace(config, train=replace(config.train, ranks=ranks, keep_checkpoints=30, validate_every=0))
    group = settings_of_group(config, config.run_folder / "model", config.run_folder / "group")
    run_on_ranks(partial(on_all, config, CASES[ranks]), group)


@pytest.fixture(scope="module")
def tuned(run: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Config]:
    """By ranks: the run in whose folder every case was done."""
    found = {}
    for ranks in CASES:
        own = replace(run, runs=str(tmp_path_factory.mktemp(f"ranks-{ranks}")))
        shutil.copytree(run.run_folder, own.run_folder)
        start(own, ranks)
        found[ranks] = own
    return found


@pytest.mark.parametrize(("ranks", "case"), [(1, "whole"), (2, "whole"), (2, "sgd")])
def test_an_interrupted_fine_tuning_gives_the_weights_of_a_whole_one(
    tuned: dict[int, Config], ranks: int, case: str
) -> None:
    config = tuned[ranks]
    assert logged(config, case) == logged(config, f"{case}-cut")
    for tuning in ("density-100-0", "cancer-100-0") if case == "whole" else ("cancer-100-0",):
        first, second = classifier(config, case, tuning), classifier(config, f"{case}-cut", tuning)
        assert all(torch.equal(first[name], second[name]) for name in first | second), tuning


def test_ranks_and_stages_change_rounding_alone(tuned: dict[int, Config]) -> None:
    assert logged(tuned[1], "whole") == pytest.approx(logged(tuned[2], "whole"), abs=1e-4)


@pytest.mark.parametrize("case", ["whole", "sgd"])
def test_all_is_trained_but_what_the_classifier_does_not_use(tuned: dict[int, Config], case: str) -> None:
    config = tuned[2]
    before = load_model(config.run_folder / "model", torch.device("cpu"))[0].state_dict()
    after = classifier(config, case)
    still = {name for name, tensor in after.items() if name in before and torch.equal(tensor, before[name])}
    # Softmax does not see the bias of the keys: rounding and Adam move it, plain gradients do not.
    still = {name for name in still if after[name].numel() and "k_proj.bias" not in name}
    assert still == {"vision.norm.weight", "vision.norm.bias", "vision.backbone.embeddings.mask_token"}
    assert after["head.weight"].abs().max() > 0
    assert {name for name in before if name.startswith("vision.")} == set(after) - {"head.weight", "head.bias"}


def test_it_stops_when_val_gets_no_better_and_takes_the_best_step(tuned: dict[int, Config]) -> None:
    """Though a signal came after step 6, in front of its validation."""
    folder = tuned[2].run_folder / "watched-cut" / "cancer-100-0"
    done = json.loads((folder / "complete.json").read_text())
    assert (done["step"], done["val_loss"]) == (4, 1.0)
    assert len(logged(tuned[2], "watched-cut")) == 8
    expected = weights_of(folder / "kept" / "step-000004")
    found = classifier(tuned[2], "watched-cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(found["head.weight"], weights_of(folder / "kept" / "step-000008")["head.weight"])


def test_the_loss_on_val_weighs_classes_alike_and_leaves_out_what_cannot_be_read() -> None:
    shares = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9], [0.2, 0.8]]).log()
    readable = torch.tensor([True, True, True, False])
    found = balanced_loss(shares, torch.tensor([0, 0, 1, 1]), readable)
    expected = -(torch.tensor([0.5, 0.25]).double().log().mean() + torch.tensor(0.9).double().log()) / 2
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(run: Config) -> None:
    """A second call starts no rank: it would not be able to."""
    place = folder_of(provenance.shard_set(run), run.run_folder)
    assert place == run.run_folder / "finetune"
    for job in jobs_of(run, run.run_folder):
        job.folder.mkdir(parents=True)
        (job.folder / IDENTITY).write_text(json.dumps(job.identity))
        (job.folder / "complete.json").write_text("{}")
    with patch.object(module, "run_on_ranks", side_effect=AssertionError):
        assert fine_tune([run], run.run_folder)
        assert fine_tune([replace(run, finetune=replace(OWN, micro_batch=2))], run.run_folder)
        with pytest.raises(ConfigError, match=r"^finetune.lr: 0.5, but \S+density-100-0 was fine-tuned with 0.01; "):
            fine_tune([replace(run, finetune=replace(OWN, lr=0.5))], run.run_folder)
        other = replace(run, train=replace(run.train, ranks=3))
        (place / "cancer-100-0" / "complete.json").unlink()
        with pytest.raises(ConfigError, match=r"^finetune.batch: 4 is not a multiple of the 3 ranks"):
            fine_tune([other], run.run_folder)


def test_shards_without_training_images_are_evaluated_as_they_are(run: Config, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", {"test": 2})
    other = replace(run, data=replace(run.data, shards=[str(tmp_path / "other")]))
    with patch.object(module, "run_on_ranks", side_effect=AssertionError):
        assert fine_tune([other], run.run_folder)
        assert fine_tune([replace(run, eval=replace(run.eval, protocols=["probe"]))], run.run_folder)
