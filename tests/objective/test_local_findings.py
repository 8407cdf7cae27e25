"""The local term over finding sentences, against loops over pairs, sentences and patches that know their words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mama.data.batches import NO_FINDING
from mama.model.mama_model import Embeddings
from mama.objective.losses import objective
from mama.runtime.launch import run_on_ranks
from mama.settings.schema import Config, LossConfig
from mama.train import grad_cache
from tests.support.tiny_model import tiny

PATCHES, WIDTH, SCALE = 5, 6, 7.0
# Of each pair its sentences; those that tell a finding begin with an F. Six pairs are two ranks of three, three of two.
TEXTS = [
    ["a", "b", "c"],
    ["Fnone", "a"],
    ["a", "Fmass", "b", "Fspecks"],
    ["b", "Fspecks", "Fmass"],  # in another order: other sentences
    ["c", "Fnone"],
    ["Fmass", "d", "Fspecks", "a", "b"],
]
ALONE = [["a"], ["b", "c"], ["Fmass"], ["a", "Fmass"], ["Fnone"], ["d", "Fnone"]]  # two ranks: one has no finding
NOBODY = [["a"], ["b", "c"], ["d"]] * 2
LOSS = LossConfig(local_start=0, local_sentences="findings")


def with_pooling(pooling: Any, **loss: Any) -> LossConfig:
    return replace(LOSS, local_pooling=pooling, **loss)


def vectors(texts: list[list[str]]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Unit vectors in float64 of each sentence of each text, and [P, D] of each image; leaves."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)
        return F.normalize(drawn, dim=-1).requires_grad_()

    return [[unit() for _ in text] for text in texts], [unit(PATCHES) for _ in texts]


def naive(texts: list[list[str]], rows: range, config: LossConfig) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    """The term among the pairs `rows` of `texts`, and the vectors that it was computed of."""
    sentences, patches = vectors(texts)
    told = {i: [s for s in texts[i] if s[0] == "F"] for i in rows if any(s[0] == "F" for s in texts[i])}
    if not told:
        return torch.zeros((), dtype=torch.float64), sentences, patches
    own = {i: [v for v, s in zip(sentences[i], texts[i], strict=True) if s[0] == "F"] for i in told}
    losses = []
    for side in ("visual", "textual"):
        score = {}
        for i in told:
            for j in told:
                cosines = [[v @ p for p in patches[j]] for v in own[i]]
                if side == "textual":
                    best = [max(column) for column in zip(*cosines, strict=True)]
                elif config.local_pooling == "max":
                    best = [max(row) for row in cosines]
                else:
                    powers = [[torch.exp(c / config.local_temperature) for c in row] for row in cosines]
                    best = [
                        sum(p * c for p, c in zip(power, row, strict=True)) / sum(power)
                        for power, row in zip(powers, cosines, strict=True)
                    ]
                score[i, j] = SCALE * sum(best) / len(best)
        for lines in ([[(i, j) for j in told] for i in told], [[(i, j) for i in told] for j in told]):
            parts = []
            for line in lines:
                right = [score[i, j] for i, j in line if told[i] == told[j]]
                everything = torch.stack([score[place] for place in line]).exp().sum().log()
                parts.append(everything - torch.stack(right).mean())
            losses.append(torch.stack(parts).mean())
    return torch.stack(losses).mean(), sentences, patches


def embeddings(texts: list[list[str]], rows: range) -> tuple[Embeddings, list[list[Tensor]], list[Tensor]]:
    """What the model makes of the pairs `rows`, padded to their longest text."""
    sentences, patches = vectors(texts)
    most = max(len(texts[i]) for i in rows)
    rest = torch.zeros(WIDTH, dtype=torch.float64)
    padded = [torch.stack([*sentences[i], *[rest] * (most - len(texts[i]))]) for i in rows]
    told = [" ".join(s for s in texts[i] if s[0] == "F") for i in rows]
    ids = torch.arange(len(rows))
    features = F.normalize(torch.ones(len(rows), WIDTH, dtype=torch.float64), dim=-1)
    e = Embeddings(
        *(ids, ids, features, features, torch.tensor(1.0), torch.tensor(SCALE, dtype=torch.float64)),
        patches=torch.stack([patches[i] for i in rows]),
        sentences=torch.stack(padded),
        sentence_mask=torch.tensor([[k < len(texts[i]) for k in range(most)] for i in rows]),
        finding_mask=torch.tensor([[s[:1] == "F" for s in [*texts[i], *[""] * (most - len(texts[i]))]] for i in rows]),
        finding_ids=torch.tensor([crc32(words.encode()) if words else NO_FINDING for words in told]),
    )
    return e, sentences, patches


def differentiated(total: Tensor, sentences: list[list[Tensor]], patches: list[Tensor]) -> list[Tensor]:
    """Gradients of all vectors, 0 where there is none."""
    leaves = [v for text in sentences for v in text] + patches
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def require_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


CASES = [(texts, pooling) for texts in (TEXTS, ALONE, NOBODY) for pooling in ("max", "softmax")]


@pytest.mark.parametrize(("texts", "pooling"), CASES)
def test_term_and_gradients_are_those_of_the_loops(texts: list[list[str]], pooling: Any) -> None:
    config = with_pooling(pooling, local_chunk=4)
    everything = range(len(texts))
    wanted, words, places = naive(texts, everything, config)
    e, own_words, own_places = embeddings(texts, everything)
    found = objective(e, config, step=0)[1]["local"]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)
    assert found.requires_grad
    require_equal(differentiated(found, own_words, own_places), differentiated(wanted, words, places))


def test_positives_of_equal_texts_make_no_difference() -> None:
    e, *_ = embeddings(TEXTS, range(6))
    e = e._replace(text_ids=torch.zeros(6, dtype=torch.long))
    found = [objective(e, replace(LOSS, positives=way), step=0)[1]["local"] for way in ("instance", "text")]
    assert found[0] == found[1]


def test_joined_micro_batches_are_one_batch() -> None:
    """They differ in their longest text."""
    parts = [embeddings(TEXTS, rows)[0] for rows in (range(2), range(2, 4), range(4, 6))]
    assert len({part.sentences.shape for part in parts if part.sentences is not None}) > 1
    wanted, *_ = naive(TEXTS, range(6), LOSS)
    found = objective(grad_cache._join(parts), LOSS, step=0)[1]["local"]
    assert found.item() == pytest.approx(wanted.item(), abs=1e-12)


def on_ranks(config: Config) -> list[list[tuple[float, list[Tensor]]]]:
    """Of each case the term on this rank, and the mean over ranks of the gradients; then with this rank's negatives."""
    import torch.distributed as dist

    from mama.runtime.collectives import rank, world_size
    from mama.train.deepspeed_engine import join_ranks

    join_ranks()
    results: list[list[tuple[float, list[Tensor]]]] = []
    for negatives in ("global", "local"):
        results.append([])
        for texts, pooling in CASES:
            loss = with_pooling(pooling, negatives=negatives)
            size = len(texts) // world_size()
            e, own_words, own_places = embeddings(texts, range(rank() * size, (rank() + 1) * size))
            found = objective(e, loss, step=0)[1]["local"]
            gradients = differentiated(found, own_words, own_places)
            for gradient in gradients:
                dist.all_reduce(gradient)
            results[-1].append((found.item(), [gradient / world_size() for gradient in gradients]))
    dist.destroy_process_group()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_differ_in_sentences_compute_the_term_of_the_whole_batch(ranks: int) -> None:
    """Also where one of them, or none, has a finding; with negatives of one rank each has a term of its own."""
    together, apart = run_on_ranks(on_ranks, tiny(ranks, global_batch=6, micro_batch=6 // ranks))
    for (texts, pooling), (value, gradients) in zip(CASES, together, strict=True):
        wanted, words, places = naive(texts, range(6), with_pooling(pooling))
        assert value == pytest.approx(wanted.item(), abs=1e-12)
        require_equal(gradients, differentiated(wanted, words, places))
    for (texts, pooling), (value, gradients) in zip(CASES, apart, strict=True):
        size, loss = 6 // ranks, with_pooling(pooling)
        parts = [naive(texts, range(first, first + size), loss) for first in range(0, 6, size)]
        assert value == pytest.approx(parts[0][0].item(), abs=1e-12)
        of_parts = [differentiated(*part) for part in parts]
        require_equal(gradients, [torch.stack(own).sum(0) / ranks for own in zip(*of_parts, strict=True)])
