"""What a GPU machine has: packages, the GPU as PyTorch sees it, and whether xformers' operators run on it."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mama.model import attention

PACKAGES = (
    "torch", "triton", "deepspeed", "xformers", "nvidia-cuda-runtime-cu12", "transformers", "peft", "numpy",
    "opencv-python-headless", "pandas", "scikit-learn", "tensorboard", "tokenizers", "safetensors", "webdataset",
    "click", "pytest",
)  # fmt: skip


def packages() -> None:
    print(f"Python {sys.version}")
    for name in PACKAGES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed")


def gpu() -> None:
    print(f"CUDA of PyTorch: {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    print(torch.cuda.get_device_properties(0))
    print(f"bf16: {torch.cuda.is_bf16_supported()}, NCCL {torch.cuda.nccl.version()}")


def extension() -> None:
    """Loaded as in a run, before xformers is imported."""
    print(f"xformers' extension: {attention.load_xformers() or 'loads'}")


def operators() -> None:
    from xformers.ops.common import OPERATORS_REGISTRY

    for operator in OPERATORS_REGISTRY:
        if operator.OPERATOR_CATEGORY == "memory_efficient_attention":
            print(f"xformers {operator.NAME}: {'available' if operator.is_available() else 'not available'}")


def chosen() -> None:
    """Which operators attention takes, forward and backward, for the towers' kinds of input."""
    from xformers.ops import LowerTriangularMask
    from xformers.ops.fmha import Inputs
    from xformers.ops.fmha.dispatch import _dispatch_bw, _dispatch_fw

    if not torch.cuda.is_available():
        return
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 80, 128):
            q, k, v = (torch.randn(2, 144, 4, width, device="cuda", dtype=dtype) for _ in range(3))
            masked = torch.zeros(2, 4, 144, 144, device="cuda", dtype=dtype)
            for name, bias in (("full", None), ("causal", LowerTriangularMask()), ("masked", masked)):
                inputs = Inputs(q, k, v, bias)
                try:
                    operators = _dispatch_fw(inputs, True), _dispatch_bw(inputs, None)
                    said = " and ".join(operator.NAME for operator in operators)
                except NotImplementedError as error:
                    said = f"none: {' '.join(str(error).rpartition('because:')[2].split())}"
                print(f"{dtype}, heads of {width}, {name}: {said}")


def runs() -> None:
    """What a run takes by itself, and that it may take xformers: its operators are tried."""
    if torch.cuda.is_available():
        for requested in ("auto", "xformers"):
            print(f"train.attention={requested}: {attention.choose(requested, torch.device('cuda'))}")


def deepspeed() -> None:
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    print(f"DeepSpeed's accelerator: {accelerator.device_name()}, {accelerator.communication_backend_name()}")


if __name__ == "__main__":
    failures = 0
    for say in (packages, gpu, extension, operators, chosen, runs, deepspeed):
        try:
            say()
        except Exception as error:
            failures += 1
            print(f"{say.__name__}: {type(error).__name__}: {error}")
    sys.exit(bool(failures))
