"""Sequences of different lengths in one row, one behind the other, so that nothing is computed on padding.

Letters: n sequences, N tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Packing:
    """The lengths of n sequences in a row of N tokens; what a kernel makes of them serves all layers.

    The lengths are on the host, as kernels and shapes need them there.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        """Raises `ValueError` for a sequence without a token, which attention has no result for."""
        self.lengths = list(lengths)
        self.masks: dict[bool, Any] = {}  # what a kernel makes of them, by whether it is causal
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: {self.lengths} has no token in a sequence")

    def segments(self, device: torch.device) -> Tensor:
        """int64 [N]: the number of the sequence of each token."""
        counts = torch.tensor(self.lengths)
        return torch.repeat_interleave(torch.arange(len(counts)), counts).to(device, non_blocking=True)

    def positions(self, device: torch.device) -> Tensor:
        """int64 [N]: the place of each token in its own sequence."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(device, non_blocking=True)

    def mean(self, tokens: Tensor) -> Tensor:
        """[N, d] -> [n, d]: the mean over the tokens of each sequence, summed in fp32."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        sums = tokens.new_zeros(len(self.lengths), tokens.shape[1], dtype=exact)
        sums.index_add_(0, self.segments(tokens.device), tokens.to(sums.dtype))
        counts = torch.tensor(self.lengths, dtype=sums.dtype).to(tokens.device, non_blocking=True)
        return (sums / counts[:, None]).to(tokens.dtype)


def padded(rows: Tensor, lengths: list[int]) -> Tensor:
    """[N, d] -> [n, longest, d]: the sequences of a row apart, with zeros behind those that are shorter."""
    longest = max(lengths)
    places = torch.cat([torch.arange(number * longest, number * longest + own) for number, own in enumerate(lengths)])
    apart = rows.new_zeros(len(lengths) * longest, rows.shape[1])
    return apart.index_copy(0, places.to(rows.device, non_blocking=True), rows).unflatten(0, (-1, longest))
