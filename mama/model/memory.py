"""Memory of a training step on one rank, by arithmetic: what the model, the optimizer and the activations take.

States: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv 1910.02054), section 3. Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation in
Large Transformer Models" (arXiv 2205.05198), section 4, whose equation 1 is written here for any width of
the MLP and without the scores of attention, which kernels that work in blocks do not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MASTER, MOMENTS = 4, 8  # bytes for a trainable parameter: its fp32 copy, the two fp32 moments of AdamW


@dataclass(frozen=True)
class States:
    """Bytes on one rank that last from step to step."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0  # in the memory of the CPU instead

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.optimizer


def states(total: int, trainable: int, ranks: int, stage: int, precision: str, offload: bool = False) -> States:
    """Bytes of weights, gradients and AdamW's state under a ZeRO stage.

    bf16: all weights in 2 bytes, and for a trainable one 4 of fp32 gradient, 4 of fp32 weight, 8 of moments.
    fp32: 4 of weight, 4 of gradient, 8 of moments; ZeRO keeps an fp32 copy of the weights there too. Stage 1
    divides the optimizer's state by the ranks, 2 the gradients as well, 3 the weights as well. With
    `offload` (stage 3) optimizer and gradients are in CPU memory. Buckets and 16-bit gradients on
    their way, and the parameters that stage 3 has gathered for a moment, come on top.
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
    """The sizes of a tower that decide over its activations."""

    layers: int
    width: int
    keys: int  # width of the keys and of the values, less than `width` with grouped-query attention
    hidden: int  # all that a token keeps inside the MLP, in numbers
    scaled: bool  # LayerScale behind attention and MLP keeps their outputs
    dropped: bool  # dropout behind attention and MLP keeps where
    upcast: bool  # norms written out in Python keep their inputs in fp32 too
    adapters: int  # under dropout: each keeps its own input, and where it was dropped
    spared: int  # of the above not kept, as only the gradient of a frozen matrix would need it

    @staticmethod
    def of(shape: Any, frozen: bool = False, adapters: int = 0) -> Transformer:
        """From a configuration of transformers.

        `frozen`: its own matrices are not trained, and `adapters` of LoRA in each layer may be, with dropout.
        """
        width, heads = shape.hidden_size, shape.num_attention_heads
        groups = getattr(shape, "num_key_value_heads", None) or heads
        hidden = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None)
        hidden = hidden or int(width * getattr(shape, "mlp_ratio", 4))
        kept = 2  # what goes into the activation and what comes out
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
        """Kept for the backward pass of one layer, `size` bytes a number, `mask` for each that dropout may take.

        A GPU keeps a byte of it, a CPU a number.

        Per token: the inputs of two norms, of the QKV projection and of the MLP, queries, attention's output
        (6 width); keys and values; the inside of the MLP; and a byte for each number under two dropouts. With
        a hidden width of 4 times the width and one GELU that is 34 width in bf16, as in the source. Compiled
        blocks keep less: within a fifth of what autograd holds.
        """
        numbers = (8 if self.scaled else 6) * self.width + 2 * self.keys + self.hidden - self.spared
        copies = 2 * 4 * self.width if self.upcast and size < 4 else 0
        copies += max(0, self.adapters - 1) * size * self.width + self.adapters * mask * self.width
        return tokens * (size * numbers + copies + (2 * mask * self.width if self.dropped else 0))

    def activations(self, tokens: int, size: int, mask: int = 1) -> int:
        """Bytes for `tokens` tokens, of all layers."""
        return self.layers * self.layer_bytes(tokens, size, mask)

    def inputs(self, tokens: int, size: int) -> int:
        """Bytes of what goes into every layer, which activation checkpointing keeps."""
        return self.layers * tokens * self.width * size


def local_head_bytes(rows: int, width: int, hidden: int, out: int, size: int) -> int:
    """Linear, norm, ReLU, Linear, norm, unit length: the inputs of each but the ReLU, the last one's in fp32."""
    return rows * (size * (width + 2 * hidden + out) + 4 * out)
