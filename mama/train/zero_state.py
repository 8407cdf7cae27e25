"""The trained state under any ZeRO stage: fp32 weights and Adam's moments, whole tensors out of pieces and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mama.run.model_state import buffers, trained
from mama.runtime.collectives import rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("weight", *MOMENTS)


def tensors(engine: DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state, whole, on all ranks, one at a time."""
    from mama.train.deepspeed_engine import adam, is_plain

    for name, parameter in trained(engine.module).items():
        for kind in STATE:
            if is_plain(engine):
                value = parameter if kind == "weight" else adam(engine).state[parameter][kind]
            else:
                value = _get(parameter, kind)
            yield f"{kind}/{name}", value.detach().cpu().view(_shape(parameter))
    for name, buffer in buffers(engine.module).items():
        yield f"buffer/{name}", buffer.detach().cpu()


def put(engine: DeepSpeedEngine, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Give this rank its part of a whole tensor of the state; no rank waits for another."""
    from mama.train.deepspeed_engine import adam, is_plain

    if not is_plain(engine):
        _set(parameter, kind, value)
    elif kind in MOMENTS:  # the weight is the model's own
        adam(engine).state[parameter][kind].copy_(value)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _get(parameter: nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value: Tensor
    value = safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)
    return value


def _set(parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """Stage 3 gives every rank a piece of one length, with padding at the end of the last ones.

    DeepSpeed's setter of whole tensors reads beyond their end there; its setter of pieces does not.
    """
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    piece: Tensor | None = getattr(parameter, "ds_tensor", None)  # this rank's, under stage 3
    if piece is None and kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    elif piece is None:
        safe_set_full_optimizer_state(parameter, value, kind)
    elif kind == "weight":
        safe_set_local_fp32_param(parameter, _piece(value, piece.numel()))
    else:
        safe_set_local_optimizer_state(parameter, _piece(value, piece.numel()), kind)


def _piece(value: Tensor, length: int) -> Tensor:
    """This rank's `length` elements of the flattened tensor, with zeros behind its end."""
    own = value.flatten()[rank() * length : (rank() + 1) * length]
    return nn.functional.pad(own, (0, length - own.numel()))
