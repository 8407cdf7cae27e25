"""What 1, 2 or 3 ranks have saved under any ZeRO stage, any number of ranks continues under any other stage."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mama.errors import TrainingError
from mama.export.model_tensors import ModelTensors
from mama.objective.losses import objective
from mama.run import checkpoints
from mama.run.model_state import digests, first_difference, trained
from mama.runtime.collectives import rank, world_size
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config
from mama.train import checkpoint, zero_state
from mama.train import deepspeed_engine as engine_module
from mama.train.first_step import digests_of_engine
from mama.train.optimizer import parameter_groups, set_rates
from mama.train.training_step import training_step
from tests.support.tiny_model import batch_of, model_of, tiny
from tests.support.word_tokenizer import tokenizer

pytestmark = pytest.mark.ranks

PAIRS = 6
RANKS = (1, 2, 3)  # few counts of parameters are multiples of 2 and 3


@dataclass(frozen=True)
class Way:
    """`cut`: stage 3 cuts small parameters too, which it otherwise keeps whole beside their pieces."""

    stage: Any
    offload: bool = False
    cut: bool = False
    precision: Any = "fp32"


BF16 = Way(2, precision="bf16")
SAVED = (Way(0), Way(1), Way(2), Way(3, cut=True))
RESUMED = (*SAVED, Way(3), Way(3, offload=True, cut=True), Way(2, precision="bf16"), Way(3, cut=True, precision="bf16"))


def folder_of(config: Config, ranks: int) -> Path:
    return Path(config.runs) / f"saved-by-{ranks}"


def start(config: Config, way: Way, saved: Path | None = None) -> tuple[Any, dict[str, str], Config]:
    """An engine, new or from a checkpoint, with the digests of its frozen weights."""
    train = replace(config.train, zero_stage=way.stage, offload=way.offload, precision=way.precision)
    config = replace(config, train=train)
    settings = engine_module.deepspeed_settings(config, world_size())
    if way.cut:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = model_of(config)
    frozen = digests(model)
    if saved:
        checkpoints.load_weights(model, saved, frozen)
    with patch.object(engine_module, "deepspeed_settings", lambda *_: settings):
        engine = engine_module.start_engine(model, config)
    if saved:
        checkpoint.load_optimizer(engine, saved)
    return engine, frozen, config


def step(engine: Any, config: Config, number: int) -> None:
    share = PAIRS // world_size()
    batch = batch_of(config, range(rank() * share, (rank() + 1) * share))
    assert training_step(engine, [batch], config, number).taken


def state(saved: Path) -> dict[str, Tensor]:
    return {key: tensor for file in saved.glob("*.safetensors") for key, tensor in load_file(file).items()}


def save(engine: Any, folder: Path, number: int, frozen: dict[str, str], piece: int = 2**14) -> int:
    """Save in pieces of so many bytes; returns how many files this rank has written."""
    with (
        patch.object(checkpoint, "PIECE", piece),
        patch.object(checkpoint, "write_tensors", wraps=checkpoint.write_tensors) as write,
    ):
        checkpoint.save(engine, folder, number, keep=99, frozen=frozen)
    return write.call_count


def save_all(config: Config) -> None:
    """Two steps under each of `SAVED`, saved as step 1 + n by all ranks; what cannot be saved is not."""
    engine_module.join_ranks()
    folder = folder_of(config, world_size())
    for n, way in enumerate(SAVED):
        engine, frozen, staged = start(config, way)
        step(engine, staged, 0)
        step(engine, staged, 1)
        assert save(engine, folder, n + 1, frozen) > 1, "every rank writes"
        write_live(engine, folder / "checkpoints" / f"step-{n + 1:06d}.live")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if last := rank() == world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, before[1]))
    with pytest.raises(OSError, match=rf"^rank {world_size() - 1} on \S+: \[Errno 27\] File too large: \S+$"):
        save(engine, folder, 98, frozen)
    if last:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name, parameter = next(iter(trained(engine.module).items()))
    shape = getattr(parameter, "ds_shape", parameter.shape)
    zero_state.put(engine, parameter, "exp_avg", torch.full(shape, float("nan")))
    with pytest.raises(TrainingError, match=f"^step-000099: exp_avg/{name} is not finite"):
        save(engine, folder, 99, frozen)
    assert [path.name for path in checkpoints.checkpoints(folder)] == [f"step-00000{n + 1}" for n in range(len(SAVED))]
    torch.distributed.destroy_process_group()


def write_live(engine: Any, path: Path) -> None:
    """What the engine's model holds, whole, in its own dtype; every rank must call it."""
    found = {name: buffer.detach().clone() for name, buffer in engine.module.named_buffers(remove_duplicate=False)}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().clone()
    if rank() == 0:
        save_file(found, path)


def save_bf16(config: Config) -> None:
    """Two steps in bf16, saved as step 9, beside what `save_all` saves."""
    engine_module.join_ranks()
    engine, frozen, staged = start(config, BF16)
    step(engine, staged, 0)
    step(engine, staged, 1)
    place = folder_of(config, world_size())
    checkpoint.save(engine, place, 9, keep=99, frozen=frozen)
    write_live(engine, place / "checkpoints" / "step-000009.live")
    torch.distributed.destroy_process_group()


def require_consolidated_as_live(config: Config, saved: Path, dtype: torch.dtype) -> None:
    """Every tensor that consolidation reads of a checkpoint is the one that the engine's model held."""
    tensors, held = ModelTensors(config, tokenizer(), saved), load_file(saved.with_suffix(".live"))
    assert tensors.first.keys() <= held.keys()
    for name in tensors.first:
        assert torch.equal(tensors.read(name).to(dtype), held[name].to(dtype)), f"{name} of {saved}"


def write_third_step(config: Config, saved: Path) -> None:
    """Beside a checkpoint: the weights after one update of the whole batch by PyTorch's AdamW in this process."""
    tensors, model = state(saved), model_of(config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {parameter: name for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim.weight_decay), betas=config.optim.betas)
    for parameter, name in names.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        moments = {kind: tensors[f"{kind}/{name}"].clone() for kind in zero_state.MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(2.0), **moments}
    set_rates(optimizer.param_groups, 2, config.train.steps, config.optim, config.loss)
    objective(model(batch_of(config, range(PAIRS))), config.loss, 2)[0].backward()
    optimizer.step()
    expected = {name: parameter.detach() for name, parameter in trained.items()}
    save_file(expected, saved.with_suffix(".expected"))


def load_all(config: Config) -> None:
    """Under each of `RESUMED`: what as many ranks have saved under the same stage, and others under another one."""
    engine_module.join_ranks()
    for n, way in enumerate(RESUMED):
        others = RANKS[(world_size() + n % 2) % len(RANKS)]
        for ranks, stage in ((world_size(), way.stage), (others, (way.stage + 1 + n % 3) % len(SAVED))):
            place = folder_of(config, ranks) / "checkpoints" / f"step-{stage + 1:06d}"
            resume(config, way, place, and_step=ranks == others)
    torch.distributed.destroy_process_group()


def resume(config: Config, way: Way, saved: Path, and_step: bool) -> None:
    """Compare what the engine then holds with the file, and with `and_step` the next update with PyTorch's."""
    engine, frozen, staged = start(config, way, saved)
    where = f"{saved} on {world_size()} ranks, {way}"
    expected = state(saved)
    found = {key: tensor.float() for key, tensor in zero_state.tensors(engine)}
    assert found.keys() == expected.keys(), where
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), f"{key} of {where}"
    again = saved.with_name(f"{saved.name}-again") / str(world_size())
    small = save(engine, again, 1, frozen, piece=2**28)
    assert small == (2 if rank() == 0 else 0), "rank 0 alone writes a small state"
    written = state(again / "checkpoints" / "step-000001")
    assert written.keys() == expected.keys(), where
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), f"{key} of {where}, written again"
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                assert torch.equal(parameter, expected[f"weight/{name}"].to(parameter.dtype)), f"{name} of {where}"
    if way.precision == "bf16":
        return
    assert not first_difference(frozen, digests_of_engine(engine)), where
    if and_step:
        step(engine, staged, 2)
        updated = dict(zero_state.tensors(engine))
        right = load_file(saved.with_suffix(".expected"))
        for name, tensor in right.items():
            if "k_proj.bias" not in name:  # its gradient is all rounding, as softmax does not see it
                assert torch.allclose(updated[f"weight/{name}"], tensor, rtol=0, atol=2e-6), f"{name} of {where}"
                assert not torch.equal(tensor, expected[f"weight/{name}"]), name


def config_of(ranks: int, folder: Path) -> Config:
    config = tiny(ranks, global_batch=PAIRS, micro_batch=PAIRS // ranks)
    return replace(config, runs=str(folder))


def test_any_number_of_ranks_continues_under_any_stage_what_any_other_has_saved(tmp_path: Path) -> None:
    """State, weights in the model and frozen weights to the last bit, and the next update as PyTorch's own."""
    for ranks in RANKS:
        config = config_of(ranks, tmp_path)
        run_on_ranks(save_all, config)
        for saved in checkpoints.checkpoints(folder_of(config, ranks)):
            write_third_step(config, saved)
            require_consolidated_as_live(config, saved, torch.float32)
    run_on_ranks(save_bf16, config_of(2, tmp_path))
    saved = folder_of(config_of(2, tmp_path), 2) / "checkpoints" / "step-000009"
    require_consolidated_as_live(config_of(2, tmp_path), saved, torch.bfloat16)
    for ranks in RANKS:
        run_on_ranks(load_all, config_of(ranks, tmp_path))


def shape_of(kind: str, registers: int) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "model_type": kind, "num_channels": 1, "image_size": 32, "patch_size": 8, "hidden_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    shape |= {"mlp_ratio": 2} if kind == "dinov2_with_registers" else {"intermediate_size": 32}
    return shape | ({} if kind == "vit" else {"num_register_tokens": registers})


def train_towers(config: Config) -> None:
    """A step of every tower, and what it has saved in a new model."""
    engine_module.join_ranks()
    towers = [(kind, registers) for kind in ("dinov2_with_registers", "dinov3_vit") for registers in (0, 4)]
    for n, (kind, registers) in enumerate([*towers, ("vit", 0)]):
        for precision in ("fp32", "bf16") if kind == "dinov3_vit" and not registers else ("fp32",):
            way = Way(3, cut=True, precision=precision)
            tower = replace(config, vision=replace(config.vision, config=shape_of(kind, registers)))
            engine, frozen, staged = start(tower, way)
            step(engine, staged, 0)
            checkpoint.save(engine, Path(config.runs), n + 1, keep=1, frozen=frozen)
            checkpoints.load_weights(model_of(staged), Path(config.runs) / "checkpoints" / f"step-{n + 1:06d}", frozen)
    torch.distributed.destroy_process_group()


def test_every_tower_trains_in_pieces_with_registers_and_without(tmp_path: Path) -> None:
    run_on_ranks(train_towers, config_of(2, tmp_path))
