"""DeepSpeed: load it, join the ranks, and start the engine that trains a model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mama.runtime.collectives import local_device, world_size
from mama.settings.schema import Config
from mama.train.deepspeed_config import deepspeed_settings
from mama.train.optimizer import parameter_groups
from mama.train.zero_state import DeepSpeedEngine, adam, adam_tensors, is_plain, moments

log = logging.getLogger(__name__)


def load_deepspeed() -> ModuleType:
    """Import DeepSpeed, set up for the devices of this machine."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # not at the top of the file: it chooses its accelerator while it is imported

    if on_cpu:
        # On joining CPU ranks DeepSpeed would compile this kernel, and fail without a C++ compiler; gloo reduces as
        # well. CUDA has no such kernel, and merely asking would try to compile all others.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_ranks(timeout: float = 1800) -> torch.device:
    """Join the process group given by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; returns this rank's device.

    Collectives time out after `timeout` seconds.
    """
    device = local_device()
    load_deepspeed().init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout),
    )
    return device


def start_engine(model: nn.Module, config: Config, optimizer: torch.optim.Optimizer | None = None) -> DeepSpeedEngine:
    """Return an engine with `model` under ZeRO. Call `join_ranks` first.

    `optimizer` is PyTorch's AdamW or its SGD without momentum; None: AdamW with the groups of pre-training.
    """
    if optimizer is None:
        optimizer = adamw(parameter_groups(model, config.optim.weight_decay, config.optim.decay), config)
    settings = deepspeed_settings(config, world_size())
    settings["zero_allow_untested_optimizer"] = isinstance(optimizer, torch.optim.SGD)
    log.info("DeepSpeed settings: %s", settings)
    engine, *_ = load_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    _start_adam(engine)
    _use_one_norm(engine)
    return engine


def adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    """PyTorch's AdamW for these parameter groups."""
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=fused)


def _start_adam(engine: DeepSpeedEngine) -> None:
    """Create Adam's state now, so that a run can be saved or resumed before its first update."""
    state = adam(engine).state
    for _, tensor in adam_tensors(engine):
        state[tensor] = {"step": torch.tensor(0.0, device=tensor.device)} | {
            name: torch.zeros_like(tensor) for name in moments(engine)
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _use_one_norm(engine: DeepSpeedEngine) -> None:
    """Let ZeRO 1 and 2 compute one norm over all gradients, and skip a step where that norm is not finite.

    ZeRO itself checks every tensor for inf and NaN, takes the norm of each, and checks the norm again in each group:
    a GPU then waits for the host for a third of its step (docs/benchmarks.md). Stage 3 already checks its norm alone.
    """
    if is_plain(engine) or engine.zero_optimization_stage() == 3:
        return
    engine.optimizer.check_overflow = lambda partition_gradients=True: None
    engine.optimizer.get_grad_norm_direct = _norm
    engine.optimizer.unscale_and_clip_grads = partial(_clip, engine.optimizer.clip_grad)


def _norm(gradients: Sequence[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
    """Return the 2-norm of the gradient partitions of all ranks; -1, ZeRO's convention, if it is not finite."""
    norms = torch._foreach_norm(list(gradients), norm_type, torch.float64)
    square = torch.stack(norms).square().sum().float()
    if world_size() > 1:
        dist.all_reduce(square)
    return torch.where(square.isfinite(), square.sqrt(), -1.0)


def _clip(largest: float, gradients: Sequence[Tensor], norm: Tensor) -> None:
    """Scale this rank's partitions in place so that the total `norm` is at most `largest`; 0 does not clip."""
    if largest:
        factor = 1 / ((norm + 1e-6) / largest).clamp(min=1)
        torch._foreach_mul_(list(gradients), factor)
