"""DeepSpeed: joining the ranks, and the engine with every setting written down."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mama.model.mama_model import MamaModel
from mama.objective.losses import first_steps
from mama.runtime.collectives import local_device, world_size
from mama.settings.schema import Config
from mama.train.optimizer import parameter_groups, set_rates
from mama.train.zero_state import MOMENTS

if not torch.cuda.is_available():  # must stand before the import, which decides by it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed import DeepSpeedEngine

# DeepSpeed would compile this kernel when it joins CPU ranks, and fail where there is no C++ compiler;
# without it gloo reduces. On CUDA there is no such kernel, and asking would try every other one with a compiler.
if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

log = logging.getLogger(__name__)

BUCKET = 50_000_000  # elements that are reduced or gathered at once


def join_ranks(timeout: int = 600) -> torch.device:
    """Join the process group that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Ranks wait for each other three times `timeout` seconds: whoever knows why one is late (`mama.data.loader`,
    `mama.train.heartbeat`) speaks first.
    """
    device = local_device()
    limit = timedelta(seconds=3 * timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)
    return device


def deepspeed_settings(config: Config, ranks: int) -> dict[str, Any]:
    """The one DeepSpeed dictionary, derived from the configuration; printed at the start of a run.

    Sizes of buckets and thresholds are DeepSpeed's own numbers, or smaller: written down, they do not
    change with its version.
    """
    zero: dict[str, Any] = {
        "stage": config.train.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET,
        "round_robin_gradients": False,
    }
    if config.train.zero_stage == 3:
        zero |= {
            "sub_group_size": 10**9,
            "stage3_prefetch_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
        }
    if config.train.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.accumulation(ranks),
        "gradient_clipping": config.optim.clip_norm,
        "prescale_gradients": False,
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        # Sums of bf16 gradients lose the small ones, over micro-batches as over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled on the spot
        "steps_per_print": 10**9,  # the monitor logs
        "wall_clock_breakdown": False,
    }


def start_engine(model: MamaModel, config: Config) -> DeepSpeedEngine:
    """The model under ZeRO with PyTorch's AdamW."""
    settings = deepspeed_settings(config, world_size())
    log.info("DeepSpeed settings: %s", settings)
    groups = parameter_groups(model, config.optim.weight_decay, config.optim.decay)
    fused = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=fused)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    _start_adam(engine)
    _use_one_norm(engine)
    return engine


def _use_one_norm(engine: DeepSpeedEngine) -> None:
    """Let ZeRO 1 and 2 take the norm of all gradients at once, and tell from it alone whether they are finite.

    It would look at every tensor for inf and nan, take each one's norm, and look at the norm again in each group, and
    a GPU waited a third of its step for the host (BENCHMARKS.md). A norm that is not finite ends the step just so, on
    all ranks.
    """
    if is_plain(engine) or engine.zero_optimization_stage() == 3:  # stage 3 looks at its norm alone by itself
        return
    engine.optimizer.check_overflow = lambda partition_gradients=True: None
    engine.optimizer.get_grad_norm_direct = _norm
    engine.optimizer.unscale_and_clip_grads = partial(_clip, engine.optimizer.clip_grad)


def _norm(gradients: Sequence[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
    """The 2-norm of this rank's pieces `gradients` and those of the others; -1, as ZeRO has it, where not finite."""
    norms = torch._foreach_norm(list(gradients), norm_type, torch.float64)
    square = torch.stack(norms).square().sum().float()
    if world_size() > 1:
        dist.all_reduce(square)
    return torch.where(square.isfinite(), square.sqrt(), -1.0)


def _clip(largest: float, gradients: Sequence[Tensor], norm: Tensor) -> None:
    """Shrink the pieces to the norm `largest`, if that of all is above it; 0 leaves them."""
    if largest:
        factor = 1 / ((norm + 1e-6) / largest).clamp(min=1)
        torch._foreach_mul_(list(gradients), factor)


def _start_adam(engine: DeepSpeedEngine) -> None:
    """Adam's state from the first moment on: a run may be saved, or resumed, before its first update."""
    state = adam(engine).state
    for _, tensor in adam_tensors(engine):
        state[tensor] = {"step": torch.tensor(0.0, device=tensor.device)} | {
            name: torch.zeros_like(tensor) for name in MOMENTS
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def is_plain(engine: DeepSpeedEngine) -> bool:
    """Stage 0 in fp32: the optimizer is PyTorch's own, and every rank holds all of it."""
    return isinstance(engine.optimizer, torch.optim.AdamW)


def adam(engine: DeepSpeedEngine) -> torch.optim.AdamW:
    """PyTorch's optimizer beneath ZeRO's wrapper."""
    optimizer: torch.optim.AdamW = engine.optimizer if is_plain(engine) else engine.optimizer.optimizer
    return optimizer


def adam_tensors(engine: DeepSpeedEngine) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The tensors that Adam updates on this rank, with their groups: parameters, or ZeRO's flat pieces of them."""
    groups = adam(engine).param_groups
    if engine.zero_optimization_stage() == 3:
        for number, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            yield groups[engine.optimizer.sub_group_to_group_id[number]], flat
        return
    for group in groups:
        for tensor in group["params"]:
            yield group, tensor


def prepare_step(engine: DeepSpeedEngine, config: Config, step: int) -> dict[str, float]:
    """Give every parameter its rate for `step`, and let terms start whose first step it is. Returns rates by tower."""
    for term, start in first_steps(config.loss).items():
        if step == start > 0:
            _forget_idle_steps(engine, term)
    return set_rates(adam(engine).param_groups, step, config.train.steps, config.optim, config.loss)


def _forget_idle_steps(engine: DeepSpeedEngine, term: str) -> None:
    """Start Adam's step count of a term's heads anew.

    The steps at gradient 0 have used up the bias correction of the moments: without this the first
    updates would be several times the learning rate.
    """
    state = adam(engine).state
    for group, tensor in adam_tensors(engine):
        if group["term"] == term:
            state[tensor]["step"].zero_()


class GradientNorms:
    """The norm of each tower's gradient, before clipping, from what Adam is handed on every rank."""

    def __init__(self, engine: DeepSpeedEngine, clip_norm: float) -> None:
        self.engine, self.clip_norm = engine, clip_norm
        self.squares: dict[str, Tensor] = {}
        adam(engine).register_step_pre_hook(self._add)

    def _add(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    square = tensor.grad.float().square().sum()
                    known = self.squares.get(group["tower"])
                    self.squares[group["tower"]] = square if known is None else known + square

    def clear(self) -> None:
        self.squares = {}

    def read(self, total: float) -> dict[str, float]:
        """Norms by tower since `clear`, for the step's `total` norm; every rank must call it."""
        if not self.squares:
            return {}  # the step was skipped, on all ranks
        names = ("vision", "text", "heads")
        squares = torch.stack([self.squares.get(name, torch.zeros(())).cpu() for name in names])
        squares = squares.to(self.engine.device)
        if world_size() > 1 and not is_plain(self.engine):  # each rank has seen its own pieces
            dist.all_reduce(squares)
        clipped = max(1.0, total / self.clip_norm) if self.clip_norm else 1.0
        return dict(zip(names, (squares.sqrt() * clipped).tolist(), strict=True))


def step_if_finite(engine: DeepSpeedEngine) -> bool:
    """Take the engine's step at the end of accumulation; False where the gradient is not finite, on all ranks.

    ZeRO looks for itself, and skips. PyTorch's optimizer does not: it passes over parameters without a gradient.
    """
    if not is_plain(engine):
        engine.step()
        return not engine.optimizer.overflow
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = bool(norm.isfinite())
    if not finite:
        for parameter in parameters:
            parameter.grad = None
        engine.gradient_clipping = lambda: 0.0  # DeepSpeed cannot clip where there are no gradients
    engine.step()
    vars(engine).pop("gradient_clipping", None)
    engine._global_grad_norm = norm  # ZeRO's optimizers tell the engine, PyTorch's does not
    return finite
