"""A checkpoint of two ranks under ZeRO-2 goes on on one rank, under every stage, as PyTorch's own AdamW would."""

from __future__ import annotations

import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open

from mama.errors import ConfigError
from mama.objective.losses import objective
from mama.run import checkpoints
from mama.run.checkpoint_marker import MARKER
from mama.run.model_state import digests
from mama.runtime.collectives import rank, world_size
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, LossConfig
from mama.train import checkpoint
from mama.train.deepspeed_engine import join_ranks, start_engine
from mama.train.first_step import FirstStep
from mama.train.optimizer import parameter_groups, set_rates
from mama.train.training_step import training_step
from tests.support.tiny_model import PAIRS, batch_of, model_of, tiny

pytestmark = pytest.mark.ranks

STAGES: list[tuple[Any, Any]] = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (1, "bf16"),
    (2, "bf16"),
    (3, "bf16"),
]
Tensors = dict[str, torch.Tensor]


def step(engine: Any, config: Config, number: int, factor: float = 1.0) -> bool:
    """One update by the whole batch; whether it was taken. `factor` spoils the loss of this rank."""

    def spoilt(*arguments: Any) -> tuple[torch.Tensor, Tensors]:
        total, terms = objective(*arguments)
        return total * factor, terms

    share = PAIRS // world_size()
    batch = batch_of(config, range(rank() * share, (rank() + 1) * share))
    with patch("mama.train.training_step.objective", spoilt):
        return training_step(engine, [batch], config, number).taken


def two_ranks(config: Config) -> list[bool]:
    """Three steps, the second of which has a gradient that is not finite on one rank only."""
    join_ranks()
    model = model_of(config)
    frozen = digests(model)
    engine = start_engine(model, config)
    watch = FirstStep(engine)
    taken = [step(engine, config, 0)]
    watch.check()
    taken.append(step(engine, config, 1, factor=float("nan") if rank() == 1 else 1.0))
    taken.append(step(engine, config, 1))
    checkpoint.save(engine, Path(config.runs), 2, keep=1, frozen=frozen)
    torch.distributed.destroy_process_group()
    return taken


def one_rank(config: Config) -> list[bool]:
    """By stage and precision: resume, write it again as step 10 + n, take a spoilt and a good step, write as 20 + n."""
    join_ranks()
    folder, taken = Path(config.runs), []
    for n, (stage, precision) in enumerate(STAGES):
        staged = replace(config, train=replace(config.train, zero_stage=stage, precision=precision, offload=stage == 3))
        model = model_of(staged)
        frozen = digests(model)
        checkpoints.load_weights(model, folder / "checkpoints" / "step-000002", frozen)
        engine = start_engine(model, staged)
        checkpoint.load_optimizer(engine, folder / "checkpoints" / "step-000002")
        checkpoint.save(engine, folder, 10 + n, keep=100, frozen=frozen)
        taken += [step(engine, staged, 2, factor=float("inf")), step(engine, staged, 2)]
        checkpoint.save(engine, folder, 20 + n, keep=100, frozen=frozen)
    torch.distributed.destroy_process_group()
    return taken


def read(folder: Path, number: int) -> tuple[Tensors, dict[str, float]]:
    place = folder / "checkpoints" / f"step-{number:06d}"
    tensors: Tensors = {}
    for path in place.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors, json.loads((place / MARKER).read_text())["adam_steps"]


def config_of(ranks: int, folder: Path) -> Config:
    """The local term starts with the first step after the resume, the view term later."""
    return replace(tiny(ranks), runs=str(folder), loss=LossConfig(local_start=2, view_start=3, positives="text"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    assert run_on_ranks(two_ranks, config_of(2, folder)) == [True, False, True], "one rank's bad gradient is everyone's"
    assert run_on_ranks(one_rank, config_of(1, folder)) == [False, True] * len(STAGES)
    return folder


@pytest.mark.parametrize("n", range(len(STAGES)))
def test_every_stage_and_precision_resumes_from_the_same_state(folder: Path, n: int) -> None:
    tensors, steps = read(folder, 2)
    again, its_steps = read(folder, 10 + n)
    assert steps == its_steps
    assert set(steps.values()) == {2.0}, "the skipped step does not count"
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]), name
    assert any(tensor.any() for name, tensor in tensors.items() if name.startswith("exp_avg_sq/"))


@pytest.mark.parametrize("n", range(len(STAGES)))
def test_the_next_update_is_that_of_pytorch(folder: Path, n: int) -> None:
    config = config_of(1, folder)
    tensors, _ = read(folder, 2)
    model = model_of(config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(tensors[f"weight/{name}"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim.weight_decay), betas=config.optim.betas)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {key: tensors[f"{key}/{names[parameter]}"].clone() for key in ("exp_avg", "exp_avg_sq")}
            steps = 0.0 if group["term"] == "local" else 2.0  # the local heads begin now
            optimizer.state[parameter] = {"step": torch.tensor(steps), **moments}
    set_rates(optimizer.param_groups, 2, config.train.steps, config.optim, config.loss)
    objective(model(batch_of(config, range(PAIRS))), config.loss, 2)[0].backward()
    optimizer.step()
    updated, its_steps = read(folder, 20 + n)
    assert {name: steps for name, steps in its_steps.items() if "/local/" in name} == dict.fromkeys(
        ("vision/local/plain", "heads/local/decayed", "heads/local/plain"), 1.0
    )
    assert {steps for name, steps in its_steps.items() if "/local/" not in name} == {3.0}
    stage, precision = STAGES[n]
    found, expected = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            before, after = tensors[f"weight/{name}"], updated[f"weight/{name}"]
            if precision == "fp32":
                assert (after - parameter.detach()).abs().max() <= 1e-7, f"{name} at stage {stage}"
            found.append((after - before).flatten())
            expected.append((parameter.detach() - before).flatten())
    # Where a bf16 gradient is all rounding, its update goes elsewhere.
    similarity = torch.cosine_similarity(torch.cat(found), torch.cat(expected), dim=0)
    assert similarity > (0.999 if precision == "fp32" else 0.95)


@pytest.mark.parametrize("n", range(len(STAGES)))
def test_heads_do_not_move_before_their_term_and_move_with_it(folder: Path, n: int) -> None:
    initial = dict(model_of(config_of(1, folder)).named_parameters())
    before, after = read(folder, 2)[0], read(folder, 20 + n)[0]
    groups = parameter_groups(model_of(config_of(1, folder)), 0.1)
    waiting = {g["term"] for g in groups} - {None}
    assert waiting == {"view", "local"}
    for name, parameter in initial.items():
        if not parameter.requires_grad:
            continue
        early, late = before[f"weight/{name}"], after[f"weight/{name}"]
        is_view = name.startswith("view_head.")
        is_local = name.startswith(("vision.norm.", "patch_head.", "sentence_head.", "local_scale."))
        assert torch.equal(early, parameter) is (is_view or is_local) or "k_proj.bias" in name, name
        assert torch.equal(late, early) is is_view or "k_proj.bias" in name, name


def test_other_frozen_weights_are_refused(folder: Path) -> None:
    model = model_of(tiny(1))
    name, parameter = next((name, p) for name, p in model.named_parameters() if not p.requires_grad and p.ndim == 2)
    parameter.data[0, 0] += 1e-6
    with pytest.raises(ConfigError, match=f"the frozen tensor {name} is not the one"):
        checkpoints.load_weights(model, folder / "checkpoints" / "step-000002", digests(model))


def test_a_model_of_another_shape_is_refused(folder: Path) -> None:
    config = tiny(1)
    model = model_of(replace(config, heads=replace(config.heads, embed_dim=8)))
    with pytest.raises(ConfigError, match=r"this configuration's model has no tensor \S+ \[16"):
        checkpoints.load_weights(model, folder / "checkpoints" / "step-000002", digests(model))


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_tensors_are_dealt_evenly_in_pieces(writers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each to one of the writers, the largest even to one that then has more than a piece; other ranks get none."""
    sizes = [1, 900, 30, 30, 0, 700, 5000, 1, 1, 400, 400, 400, 90]
    tensors = {str(n): torch.full((size,), float(n)) for n, size in enumerate(sizes)}
    monkeypatch.setattr(checkpoint, "PIECE", 4 * 1000)
    dealt = []
    for place in range(4):
        monkeypatch.setattr(checkpoint, "rank", lambda place=place: place)
        dealt.append(list(checkpoint._deal(iter(tensors.items()), writers)))
    counts = {tuple(count for _, count in rounds) for rounds in dealt}
    assert len(counts) == 1, "all ranks number the pieces alike"
    for *pieces, (_, count) in zip(*([piece for piece, _ in rounds] for rounds in dealt), dealt[0], strict=True):
        assert [bool(piece) for piece in pieces] == [place < count for place in range(4)]
        held = [sum(tensor.numel() for tensor in piece.values()) for piece in pieces]
        assert all(numbers <= 1000 or len(piece) == 1 for piece, numbers in zip(pieces, held, strict=True))
        assert max(held[:writers]) - min(held[:writers]) <= max(t.numel() for p in pieces for t in p.values())
    merged = [item for rounds in dealt for piece, _ in rounds for item in piece.items()]
    assert len(merged) == len(tensors)
    assert all(tensors[name] is tensor or torch.equal(tensors[name], tensor) for name, tensor in merged)
    assert all(not piece for place in range(writers, 4) for piece, _ in dealt[place])


def test_running_statistics_are_those_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have batch norms of their own: a mean of one and a variance of another belong to nothing."""
    tensors = {"weight/a": torch.ones(9), "buffer/n.running_mean": torch.ones(9), "buffer/n.running_var": torch.ones(9)}
    found = []
    for place in range(2):
        monkeypatch.setattr(checkpoint, "rank", lambda place=place: place)
        found.append({key for piece, _ in checkpoint._deal(iter(tensors.items()), 2) for key in piece})
    assert {key for key in found[0] if key.startswith("buffer")} == {key for key in tensors if key.startswith("buffer")}
    assert set.union(*found) == set(tensors)


def test_a_folder_that_a_network_file_system_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = threading.Timer(0.2, (tmp_path / "late").mkdir)
    later.start()
    checkpoint._wait_for(tmp_path / "late")
    later.join()
    monkeypatch.setattr(checkpoint, "WAIT", 0.0)
    with pytest.raises(OSError, match=r"/never: not there after 0 s; is it on a disk that all machines share\?$"):
        checkpoint._wait_for(tmp_path / "never")


def test_what_is_written_may_be_read_by_whom_the_umask_lets(folder: Path) -> None:
    """safetensors itself leaves files that only their owner may read."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
