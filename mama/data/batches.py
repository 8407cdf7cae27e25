"""Pairs -> `Batch`: a rank's micro-batches, in the global order of `mama.data.sample_order`.

Letters: b pairs of a micro-batch, u distinct rows of tokens, L tokens of the longest, S sentences of the longest text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mama.data import sample_order
from mama.data.loader import CPU, load, numbers_on, to_device
from mama.data.pairs import Pair, Pairs
from mama.data.report_text import tells_finding
from mama.data.tokenizer import Tokenizer
from mama.settings.schema import Config

NO_FINDING = -1  # in place of a hash, which is at least 0


class Tensors:
    """A dataclass of tensors that move together."""

    def to(self, device: torch.device) -> Self:
        """A copy on `device`, see `to_device`."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Self:
        """A copy in pinned memory; the loader calls it if there is a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `change` applied to each tensor."""
        parts = dict(vars(self))
        for name, part in parts.items():
            if isinstance(part, Tensor):
                parts[name] = change(part)
            elif isinstance(part, Tensors):
                parts[name] = part._map(change)
        return type(self)(**parts)


@dataclass
class Rows(Tensors):
    """Rows of tokens, each once, padded on the right."""

    tokens: Tensor  # int64 [u, L]
    lengths: list[int]  # tokens of each row, without padding; on the host, which a GPU need not be asked for them

    @property
    def mask(self) -> Tensor:
        """bool [u, L], false at padding; made anew at each call."""
        device = self.tokens.device
        return torch.arange(self.tokens.shape[1], device=device) < numbers_on(device, self.lengths)[:, None]


@dataclass
class Texts(Rows):
    """Tokenised texts, and their sentences."""

    separators: Tensor  # int64 [u, S], positions of the tokens at which sentences end
    sentence_mask: Tensor  # bool [u, S], false at padding
    sentences: Rows  # the different sentences of all texts, each with its separator
    sentence_row: Tensor  # int64 [u, S], row of each sentence in `sentences`; 0 at padding


@dataclass
class Batch(Tensors):
    """One micro-batch of b training pairs (anchor v, partner w) and their texts."""

    keys: list[str]  # "<study key>/<member>" of the anchors
    anchors: Tensor  # uint8 [b, 1, H, W]
    partners: Tensor  # uint8 [b, 1, H, W]
    anchor_changes: Tensor  # float32 [b, 10], augmentation parameters, see mama.data.augment
    partner_changes: Tensor
    texts: Texts
    anchor_text_row: Tensor  # int64 [b], row of the anchor's report text in `texts`
    partner_text_row: Tensor  # int64 [b], of the partner's: the same row unless another breast or crop
    text_ids: Tensor  # int64 [b], hash of the anchor's report text: equal texts have equal ids
    partner_text_ids: Tensor  # int64 [b], of the partner's
    finding_mask: Tensor  # bool [b, S], which sentences of the anchor's text tell a finding
    finding_ids: Tensor  # int64 [b], hash of these sentences; NO_FINDING if there are none
    unreadable: int = 0  # unreadable samples that pairs of this batch replace


class Collate:
    """Pairs -> `Batch`; a class so that loader workers can receive it."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, pairs: list[Pair]) -> Batch:
        rows: dict[tuple[str, ...], int] = {}
        anchor_text_row = [rows.setdefault(tuple(p.anchor_sentences), len(rows)) for p in pairs]
        partner_text_row = [rows.setdefault(tuple(p.partner_sentences), len(rows)) for p in pairs]
        texts = tokenise(self.tokenizer, [list(text) for text in rows], self.max_tokens)
        finding_mask, finding_ids = _findings(rows, texts)
        return Batch(
            keys=[p.key for p in pairs],
            anchors=torch.from_numpy(np.stack([p.anchor for p in pairs])[:, None]),
            partners=torch.from_numpy(np.stack([p.partner for p in pairs])[:, None]),
            anchor_changes=torch.from_numpy(np.stack([p.anchor_change for p in pairs])),
            partner_changes=torch.from_numpy(np.stack([p.partner_change for p in pairs])),
            texts=texts,
            anchor_text_row=torch.tensor(anchor_text_row),
            partner_text_row=torch.tensor(partner_text_row),
            text_ids=torch.tensor([_text_id(p.anchor_sentences) for p in pairs]),
            partner_text_ids=torch.tensor([_text_id(p.partner_sentences) for p in pairs]),
            finding_mask=finding_mask[anchor_text_row],
            finding_ids=finding_ids[anchor_text_row],
            unreadable=sum(p.unreadable for p in pairs),
        )


def tokenise(tokenizer: Tokenizer, texts: list[list[str]], max_tokens: int) -> Texts:
    """Lists of sentences -> `Texts`, padded to the longest of this call, truncated to `max_tokens`.

    Raises `ValueError` if a text has no sentence.
    """
    encoded = [tokenizer.encode(sentences, max_tokens) for sentences in texts]
    if not all(e.separators for e in encoded):
        raise ValueError("texts: one has no sentence")  # checked here: on a GPU a check would force a synchronisation
    length = max(len(e.tokens) for e in encoded)
    sentences = max(len(e.separators) for e in encoded)
    tokens = torch.full((len(encoded), length), tokenizer.pad_id)
    separators = torch.zeros(len(encoded), sentences, dtype=torch.long)
    sentence_mask = torch.zeros(len(encoded), sentences, dtype=torch.bool)
    for row, e in enumerate(encoded):
        tokens[row, : len(e.tokens)] = torch.tensor(e.tokens)
        separators[row, : len(e.separators)] = torch.tensor(e.separators)
        sentence_mask[row, : len(e.separators)] = True
    own, row_of = sentence_rows(tokens, separators, sentence_mask, tokenizer.pad_id)
    return Texts(tokens, [len(e.tokens) for e in encoded], separators, sentence_mask, own, row_of)


def sentence_rows(tokens: Tensor, separators: Tensor, mask: Tensor, pad: int) -> tuple[Rows, Tensor]:
    """`sentences` and `sentence_row` of `Texts`, padded with the token `pad`."""
    numbers: dict[tuple[int, ...], int] = {}
    row_of = torch.zeros_like(separators)
    for row, (text, ends, own) in enumerate(zip(tokens.tolist(), separators.tolist(), mask.tolist(), strict=True)):
        start = 0
        for place, end in enumerate(compress(ends, own)):
            row_of[row, place] = numbers.setdefault(tuple(text[start : end + 1]), len(numbers))
            start = end + 1
    lengths = [len(sentence) for sentence in numbers]
    rows = torch.full((len(numbers), max(lengths)), pad)
    for row, sentence in enumerate(numbers):
        rows[row, : len(sentence)] = torch.tensor(sentence)
    return Rows(rows, lengths), row_of


def _findings(sentences: Iterable[Sequence[str]], texts: Texts) -> tuple[Tensor, Tensor]:
    """Which sentences of each text tell a finding, bool [u, S], and a hash of their tokens, int64 [u].

    Both are of what `max_tokens` left of a text: neither knows of a sentence that was cut off.
    """
    mask, ids = torch.zeros_like(texts.sentence_mask), []
    for row, text in enumerate(sentences):
        ends = texts.separators[row][texts.sentence_mask[row]].tolist()
        starts = [0, *(end + 1 for end in ends)]
        told = [n for n, sentence in enumerate(text[: len(ends)]) if tells_finding(sentence)]
        mask[row, told] = True
        tokens = b"".join(texts.tokens[row, starts[n] : starts[n + 1]].numpy().tobytes() for n in told)
        ids.append(_hash(tokens) if told else NO_FINDING)
    return mask, torch.tensor(ids)


def _text_id(sentences: list[str]) -> int:
    return _hash("\n".join(sentences).encode())


def _hash(content: bytes) -> int:
    """63 bits, the same in every process and on every rank."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class MicroBatches:
    """Batch sampler of the loader; generates indices lazily, not those of a whole run at once."""

    config: Config
    steps: range
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[int]]:
        sizes = self.config.train.global_batch, self.config.train.micro_batch
        return sample_order.micro_batches(self.steps, *sizes, self.rank, self.world_size)

    def __len__(self) -> int:
        return len(self.steps) * self.config.train.accumulation(self.world_size)


def training_batches(
    config: Config, tokenizer: Tokenizer, steps: range, rank: int, world_size: int, device: torch.device = CPU
) -> Generator[Batch, None, None]:
    """This rank's micro-batches for `steps`, in order, for `device`; `TrainConfig.accumulation` of them make a step.

    Raises as `mama.data.loader.load` does.
    """
    batches = MicroBatches(config, steps, rank, world_size)
    return load(Pairs(config), config, Collate(tokenizer, config.data.max_tokens), device, batch_sampler=batches)
