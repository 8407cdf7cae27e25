"""An estimate of the memory of a training step on one rank: weights, gradients, optimizer state, activations.

States: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv 1910.02054), section 3. Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in
Large Transformer Models" (arXiv 2205.05198), section 4: equation 1, generalised to any width of the MLP and without
the attention scores, which memory-efficient kernels do not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MASTER, MOMENTS = 4, 8  # bytes per trainable parameter: its fp32 copy, the two fp32 moments of AdamW


@dataclass(frozen=True)
class States:
    """Bytes on one rank that persist from step to step."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0  # in CPU memory

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


def states(total: int, trainable: int, ranks: int, stage: int, precision: str, offload: bool = False) -> States:
    """Bytes of weights, gradients and AdamW's state under a ZeRO stage, for `total` and `trainable` parameters.

    bf16: 2 bytes per weight, and per trainable one 4 of fp32 gradient, 4 of fp32 weight, 8 of moments. fp32: 4 of
    weight, 4 of gradient, 8 of moments; ZeRO keeps another fp32 copy of the weights. Stage 1 divides the optimizer
    state by the ranks, 2 also the gradients, 3 also the weights. With `offload` (stage 3) optimizer state and
    gradients are in CPU memory. Not included: communication buckets, 16-bit gradients in flight, and parameters that
    stage 3 has gathered.
    """
    weight = 2 if precision == "bf16" else 4
    master = MASTER if precision == "bf16" or stage else 0

    def share(size: int, from_stage: int) -> int:
        return -(-size // ranks) if stage >= from_stage else size

    weights, gradients = share(weight * total, 3), share(4 * trainable, 2)
    optimizer = share((master + MOMENTS) * trainable, 1)
    if offload:
        return States(weights, 0, 0, host=gradients + optimizer)
    return States(weights, gradients, optimizer)


@dataclass(frozen=True)
class Transformer:
    """The sizes of a tower that determine the memory of its activations."""

    layers: int
    width: int
    keys: int  # width of the keys and of the values, less than `width` with grouped-query attention
    hidden: int  # elements that a token keeps inside the MLP
    scaled: bool  # LayerScale after attention and MLP keeps their outputs
    dropped: bool  # dropout after attention and MLP keeps its mask
    upcast: bool  # norms written out in Python also keep their inputs in fp32
    adapters: int  # LoRA adapters with dropout: each keeps its own input and dropout mask
    spared: int  # elements of the above not kept, as only the gradient of a frozen matrix would need them

    @staticmethod
    def of(shape: Any, frozen: bool = False, adapters: int = 0) -> Transformer:
        """From a transformers config `shape`.

        `frozen`: its own matrices are not trained; `adapters`: LoRA adapters with dropout in each layer.
        """
        width, heads = shape.hidden_size, shape.num_attention_heads
        groups = getattr(shape, "num_key_value_heads", None) or heads
        hidden = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None)
        hidden = hidden or int(width * getattr(shape, "mlp_ratio", 4))
        kept = 2  # input and output of the activation function
        if shape.model_type == "llama" or any(
            getattr(shape, gate, False) for gate in ("use_swiglu_ffn", "use_gated_mlp")
        ):
            kept = 4  # gated: two projections, the activated one, their product
        return Transformer(
            shape.num_hidden_layers,
            width,
            width * groups // heads,
            kept * hidden,
            scaled=hasattr(shape, "layerscale_value"),
            dropped=any(getattr(shape, name, 0) for name in ("resid_pdrop", "hidden_dropout_prob")),
            upcast=shape.model_type == "llama",
            adapters=adapters,
            spared=width + hidden if frozen else 0,
        )

    def layer_bytes(self, tokens: int, size: int, mask: int = 1) -> int:
        """Bytes that one layer keeps for the backward pass, at `size` bytes per element and `mask` per dropped one.

        `mask` is 1 on a GPU and `size` on a CPU. Per token: the inputs of two norms, of the QKV projection and of the
        MLP, queries, attention's output (6 width); keys and values; the inside of the MLP; two dropout masks. With an
        MLP of 4 width and one GELU that is 34 width bytes in bf16, as in the source. Within a fifth of what autograd
        holds; compiled blocks keep less.
        """
        numbers = (8 if self.scaled else 6) * self.width + 2 * self.keys + self.hidden - self.spared
        copies = 2 * 4 * self.width if self.upcast and size < 4 else 0
        copies += max(0, self.adapters - 1) * size * self.width + self.adapters * mask * self.width
        return tokens * (size * numbers + copies + (2 * mask * self.width if self.dropped else 0))

    def activations(self, tokens: int, size: int, mask: int = 1) -> int:
        """Bytes that all layers keep for `tokens` tokens; arguments as for `layer_bytes`."""
        return self.layers * self.layer_bytes(tokens, size, mask)

    def inputs(self, tokens: int, size: int) -> int:
        """Bytes of the inputs of all layers, which activation checkpointing keeps."""
        return self.layers * tokens * self.width * size


def local_head_bytes(rows: int, width: int, hidden: int, out: int, size: int) -> int:
    """Bytes that a local head keeps: the inputs of Linear, norm, Linear and norm, and in fp32 of the unit length."""
    return rows * (size * (width + 2 * hidden + out) + 4 * out)
