"""The DeepSpeed dictionary of a run, derived from its settings."""

from __future__ import annotations

from typing import Any

import torch

from mama.settings.schema import Config

BUCKET = 50_000_000  # elements reduced or gathered at once


def deepspeed_settings(config: Config, ranks: int) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`, the only one; it is logged when a run starts.

    Bucket sizes and thresholds are DeepSpeed's defaults, or smaller: written out, they do not change with its version.
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
        # Sums in bf16 lose small gradients, over micro-batches as over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed would compile its own at the start
        "steps_per_print": 10**9,  # the monitor logs
        "wall_clock_breakdown": False,
    }
