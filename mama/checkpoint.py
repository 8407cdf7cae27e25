"""Resumable checkpoints: `checkpoints/step-000500/`, complete only when its marker file is there.

A checkpoint holds every trained tensor whole, in fp32, with its two moments of Adam, whatever the ranks and
the ZeRO stage: any other number of ranks and any other stage continues from it. Frozen weights are not
written again; their digests are, and are compared. It is written beside its place and renamed, the marker
being the last file in it. Resuming takes the newest complete one; whatever is torn is left alone and named
in the log.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mama.config import ConfigError
from mama.dist import barrier, rank, world_size
from mama.frozen import first_difference

if TYPE_CHECKING:  # what only looks for checkpoints does without it
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

MARKER = "complete.json"
FROZEN = "frozen.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 2**31  # bytes of tensors in one file, which is what rank 0 holds in memory besides


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (run / "checkpoints").glob(f"step-*[0-9]/{MARKER}") if _is_whole(p.parent))


def best(run: Path) -> Path | None:
    """The complete checkpoint with the highest validation score; the newest of equals."""
    scored = [(score, path) for path in checkpoints(run) if (score := _marker(path)["score"]) is not None]
    return max(scored)[1] if scored else None


def newest(run: Path) -> Path | None:
    """The checkpoint to resume from; what is torn is named in the log."""
    complete = checkpoints(run)
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if folder not in complete and rank() == 0:
            log.warning("%s is not complete and is ignored", folder)
    return complete[-1] if complete else None


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    return int(_marker(checkpoint)["step"])


def save(
    engine: DeepSpeedEngine,
    run: Path,
    step: int,
    keep: int,
    frozen: dict[str, str],
    score: float | None = None,
    facts: Mapping[str, int] | None = None,
) -> None:
    """Write the state after `step` steps; every rank must call it.

    `facts` are what a resumed run wants to know besides. All checkpoints but the `keep` newest and the best are
    deleted.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    aside = folder.with_name(folder.name + ".partial")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _write_pieces(_tensors(engine), aside)
    if rank() == 0:
        (aside / FROZEN).write_text(json.dumps(frozen, indent=0))
        marker = {
            "step": step,
            "ranks": world_size(),
            "score": score,
            "adam_steps": _adam_steps(engine),
            "facts": dict(facts or {}),
            "bytes": {path.name: path.stat().st_size for path in aside.iterdir()},
        }
        (aside / MARKER).write_text(json.dumps(marker))
        for path in (*aside.iterdir(), aside):
            _to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _to_disk(folder.parent)
        kept = {*checkpoints(run)[-keep:], best(run)}
        for old in checkpoints(run):
            if old not in kept:
                (old / MARKER).unlink()  # first, so that a half-deleted checkpoint is never complete
                shutil.rmtree(old)
    barrier()


def facts_of(checkpoint: Path) -> dict[str, int]:
    """What `save` was given as `facts`."""
    facts: dict[str, int] = _marker(checkpoint)["facts"]
    return facts


def load_weights(model: nn.Module, checkpoint: Path, frozen: dict[str, str]) -> None:
    """Put the trained weights and the buffers into a model that no engine has taken yet.

    Raises `ConfigError` where the model has other trained tensors, or frozen ones with another digest.
    """
    if name := first_difference(json.loads((checkpoint / FROZEN).read_text()), frozen):
        raise ConfigError(f"{checkpoint}: the frozen tensor {name} is not the one that the run was trained with")
    wanted = _trained(model) | _buffers(model)
    found = 0
    for key, tensor in _read(checkpoint):
        kind, _, name = key.partition("/")
        if kind not in MOMENTS:
            if name not in wanted or wanted[name].shape != tensor.shape:
                raise ConfigError(f"{checkpoint}: this configuration's model has no tensor {name} {list(tensor.shape)}")
            wanted[name].data.copy_(tensor)
            found += 1
    if found != len(wanted):
        raise ConfigError(f"{checkpoint}: holds {found} of the {len(wanted)} trained tensors of this configuration")


def load_optimizer(engine: DeepSpeedEngine, checkpoint: Path) -> None:
    """Give the engine ZeRO's own fp32 weights, Adam's moments and its step counts; every rank must call it."""
    from mama.engine import adam, adam_tensors, is_plain

    steps = _marker(checkpoint)["adam_steps"]
    state = adam(engine).state
    for group, tensor in adam_tensors(engine):
        state[tensor]["step"].fill_(steps[_group_name(group)])
    trained = _trained(engine.module)
    for key, value in _read(checkpoint):
        kind, _, name = key.partition("/")
        if name not in trained:
            continue
        if not is_plain(engine):
            _set(trained[name], kind, value)
        elif kind in MOMENTS:
            state[trained[name]][kind].copy_(value)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors and buffers by name, in fp32."""
    parts = ((key.partition("/"), tensor) for key, tensor in _read(checkpoint))
    return {name: tensor for (kind, _, name), tensor in parts if kind not in MOMENTS}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Running statistics; the other buffers of the towers are constants of their architecture."""
    return {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _tensors(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state, whole, on all ranks, one at a time."""
    from mama.engine import adam, is_plain

    for name, parameter in _trained(engine.module).items():
        for kind in ("weight", *MOMENTS):
            if is_plain(engine):
                value = parameter if kind == "weight" else adam(engine).state[parameter][kind]
            else:
                value = _get(parameter, kind)
            yield f"{kind}/{name}", value.detach().cpu().view(_shape(parameter))
    for name, buffer in _buffers(engine.module).items():
        yield f"buffer/{name}", buffer.detach().cpu()


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _get(parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value: Tensor
    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    return value


def _set(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def _adam_steps(engine: DeepSpeedEngine) -> dict[str, float]:
    from mama.engine import adam, adam_tensors

    state = adam(engine).state
    return {_group_name(group): float(state[tensor]["step"]) for group, tensor in adam_tensors(engine)}


def _group_name(group: dict[str, Any]) -> str:
    return f"{group['tower']}/{group['term']}/{'decayed' if group['weight_decay'] else 'plain'}"


def _write_pieces(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Rank 0 writes, the others take part in gathering."""
    piece: dict[str, Tensor] = {}
    number = size = 0
    for key, tensor in tensors:
        if rank() != 0:
            continue
        if piece and size + tensor.nbytes > PIECE:
            save_file(piece, folder / f"state-{number:05d}.safetensors")
            piece, number, size = {}, number + 1, 0
        piece[key] = tensor.float().contiguous()
        size += tensor.nbytes
    if rank() == 0:
        save_file(piece, folder / f"state-{number:05d}.safetensors")


def _read(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(checkpoint.glob("state-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                yield key, file.get_tensor(key)


def _is_whole(checkpoint: Path) -> bool:
    """Does its marker name its files, and are they as long as it says? A power cut may leave neither."""
    try:
        sizes = _marker(checkpoint)["bytes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _marker(checkpoint: Path) -> dict[str, Any]:
    marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_text())
    return marker
