"""Sequences of different lengths in one row, one behind the other, so that nothing is computed on padding.

Letters: n sequences, N tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mama.data.loader import numbers_on


class Packing:
    """The lengths of n sequences in a row of N tokens; what a kernel makes of them serves all layers.

    The lengths are on the host, as kernels and shapes need them there.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        """Raises `ValueError` for a sequence without a token, which attention has no result for."""
        self.lengths = list(lengths)
        self.masks: dict[bool, Any] = {}  # what a kernel makes of them, by whether it is causal
        self._counts: dict[torch.device, Tensor] = {}
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: {self.lengths} has no token in a sequence")

    def counts(self, device: torch.device) -> Tensor:
        """int64 [n]: the lengths."""
        if device not in self._counts:
            self._counts[device] = numbers_on(device, self.lengths)
        return self._counts[device]

    def starts(self, device: torch.device) -> Tensor:
        """int64 [n]: the place in the row of the first token of each sequence."""
        counts = self.counts(device)
        return counts.cumsum(0) - counts

    def segments(self, device: torch.device) -> Tensor:
        """int64 [N]: the number of the sequence of each token."""
        numbers = torch.arange(len(self.lengths), device=device)
        # Its size is given, or the host would wait for the device to learn it.
        return torch.repeat_interleave(numbers, self.counts(device), output_size=sum(self.lengths))

    def positions(self, device: torch.device) -> Tensor:
        """int64 [N]: the place of each token in its own sequence."""
        return torch.arange(sum(self.lengths), device=device) - self.starts(device)[self.segments(device)]

    def mean(self, tokens: Tensor) -> Tensor:
        """[N, d] -> [n, d]: the mean over the tokens of each sequence, summed in fp32."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        sums = tokens.new_zeros(len(self.lengths), tokens.shape[1], dtype=exact)
        sums.index_add_(0, self.segments(tokens.device), tokens.to(sums.dtype))
        return (sums / self.counts(tokens.device)[:, None]).to(tokens.dtype)


def padded(rows: Tensor, lengths: list[int]) -> Tensor:
    """[N, d] -> [n, longest, d]: the sequences of a row apart, with zeros behind those that are shorter."""
    packing, longest = Packing(lengths), max(lengths)
    places = packing.segments(rows.device) * longest + packing.positions(rows.device)
    apart = rows.new_zeros(len(lengths) * longest, rows.shape[1])
    return apart.index_copy(0, places, rows).unflatten(0, (-1, longest))
