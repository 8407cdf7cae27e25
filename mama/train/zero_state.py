"""Train state under any ZeRO stage: AdamW's tensors on this rank, and whole fp32 tensors from all ranks' partitions."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mama.run.checkpoints import WEIGHTS
from mama.run.model_state import buffers, trained
from mama.runtime.collectives import rank

# deepspeed.DeepSpeedEngine, which has no types. DeepSpeed is imported inside functions alone, since
# `deepspeed_engine.load_deepspeed` has to set it up before.
DeepSpeedEngine = Any
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("weight", *MOMENTS)


def is_plain(engine: DeepSpeedEngine) -> bool:
    """Whether this is stage 0 in fp32, where the optimizer is PyTorch's own and every rank holds all of its state."""
    return isinstance(engine.optimizer, torch.optim.AdamW | torch.optim.SGD)


def moments(engine: DeepSpeedEngine) -> tuple[str, ...]:
    """The names of the optimizer's running moments: AdamW has two, SGD without momentum none."""
    return MOMENTS if isinstance(adam(engine), torch.optim.AdamW) else ()


def adam(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Return PyTorch's optimizer beneath ZeRO's wrapper."""
    return engine.optimizer if is_plain(engine) else engine.optimizer.optimizer


def adam_tensors(engine: DeepSpeedEngine) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield each tensor that Adam updates on this rank with its group: parameters, or ZeRO's flat partitions."""
    groups = adam(engine).param_groups
    if engine.zero_optimization_stage() == 3:
        for number, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            yield groups[engine.optimizer.sub_group_to_group_id[number]], flat
        return
    for group in groups:
        for tensor in group["params"]:
            yield group, tensor


def size(engine: DeepSpeedEngine) -> int:
    """The bytes of the trained weights and their moments."""
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained(engine.module).values())
    return 4 * count * (1 + len(moments(engine)))


def tensors(engine: DeepSpeedEngine, kinds: Collection[str] = (*WEIGHTS, *MOMENTS)) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of these kinds by `kind/name`, whole, on this rank's device; every rank must iterate."""
    for name, parameter in trained(engine.module).items():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under stage 3 the parameter itself is empty
        for kind in ("weight", *moments(engine)):
            if kind not in kinds:
                continue
            if is_plain(engine):
                value = parameter if kind == "weight" else adam(engine).state[parameter][kind]
            else:
                value = _get(parameter, kind)
            yield f"{kind}/{name}", value.detach().view(shape)
    for name, buffer in buffers(engine.module).items():
        if "buffer" in kinds:
            yield f"buffer/{name}", buffer.detach()


def put(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Store this rank's part of the whole tensor `value` of the train state; needs no other rank."""
    if not is_plain(engine):
        _set(parameter, kind, value)
    elif kind in MOMENTS:  # the weight is the model's own
        adam(engine).state[parameter][kind].copy_(value)


def _get(parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)


def _set(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Under stage 3 all ranks' partitions have one length, and the last ones end in padding.

    DeepSpeed's setters of whole tensors read beyond the tensor's end there; its setters of partitions do not.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    partition: Tensor | None = getattr(parameter, "ds_tensor", None)  # this rank's, under stage 3
    if partition is None and kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    elif partition is None:
        safe_set_full_optimizer_state(parameter, value, kind)
    elif kind == "weight":
        safe_set_local_fp32_param(parameter, _partition_of(value, partition.numel()))
    else:
        safe_set_local_optimizer_state(parameter, _partition_of(value, partition.numel()), kind)


def _partition_of(value: Tensor, length: int) -> Tensor:
    """Return this rank's `length` elements of the flattened tensor, padded with zeros behind its end."""
    own = value.flatten()[rank() * length : (rank() + 1) * length]
    return nn.functional.pad(own, (0, length - own.numel()))
