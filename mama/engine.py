"""DeepSpeed: joining the ranks, and the engine with every setting written down."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from mama.config import Config
from mama.dist import local_device, world_size
from mama.model import MamaModel
from mama.optim import parameter_groups

if not torch.cuda.is_available():  # must stand before the import, which decides by it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops

# DeepSpeed would compile this kernel when it joins CPU ranks, and fail where there is no C++ compiler;
# without it gloo reduces.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

log = logging.getLogger(__name__)


def join_ranks() -> torch.device:
    """Join the process group that the launcher described in RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    device = local_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def deepspeed_settings(config: Config, ranks: int) -> dict[str, Any]:
    """The one DeepSpeed dictionary, derived from the configuration; printed at the start of a run."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.train.accumulation(ranks),
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},  # sums of bf16 gradients lose the small ones
        "zero_optimization": {"stage": config.train.zero_stage, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,  # the monitor logs
        "wall_clock_breakdown": False,
    }


def start_engine(model: MamaModel, config: Config) -> deepspeed.DeepSpeedEngine:
    """The model under ZeRO with PyTorch's AdamW."""
    settings = deepspeed_settings(config, world_size())
    log.info("DeepSpeed settings: %s", settings)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr, betas=config.optim.betas
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine
