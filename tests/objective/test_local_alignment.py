"""Symmetric local alignment against a loop over every text and every image in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mama.objective import local_alignment
from mama.objective.local_alignment import alignment_scores
from tests.support.alignment_loop import IMAGES, MASK, PATCH_MASK, inputs, loop


def differentiated(visual: Tensor, textual: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum that weighs every score differently."""
    weights = torch.randn(2, *visual.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((weights[0] * visual).sum() + (weights[1] * textual).sum(), of)


@pytest.fixture(params=["as on a CPU", "as on a GPU"], autouse=True)
def _counted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences alone, or where a GPU would have to be waited for to count them, zeros besides."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(local_alignment, "countable", lambda mask: False)


def spoilt(patches: Tensor) -> Tensor:
    """With cosines that would be the highest where there is no patch."""
    return patches.detach().masked_fill(~PATCH_MASK[..., None], 1e3).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 2, 3, IMAGES, 100])
@pytest.mark.parametrize("temperature", [None, 0.1, 2.0], ids=["max", "softmax", "soft softmax"])
@pytest.mark.parametrize("patch_mask", [None, PATCH_MASK], ids=["all patches", "some patches"])
@pytest.mark.parametrize(
    ("dtype", "close", "gradient_close"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 4e-3)],
)
def test_scores_and_gradients_are_those_of_the_loop(
    dtype: torch.dtype,
    close: float,
    gradient_close: float,
    patch_mask: Tensor | None,
    temperature: float | None,
    chunk: int,
) -> None:
    sentences, patches = inputs(dtype)
    patches = patches if patch_mask is None else spoilt(patches)
    exact = [x.detach().double().requires_grad_() for x in (sentences, patches)]
    wanted = loop(exact[0], MASK, exact[1], patch_mask, temperature)
    got = alignment_scores(sentences, MASK, patches, chunk, patch_mask, temperature)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), theirs, atol=close, rtol=0)
    gradients = differentiated(*got, sentences, patches)
    expected = differentiated(*wanted, *exact)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.dtype == dtype
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine.double(), theirs, atol=gradient_close * max(scale, 1), rtol=0)
    assert not gradients[0][~MASK].any()
    if patch_mask is not None:
        assert not gradients[1][~patch_mask].any()


@pytest.mark.parametrize("temperature", [None, 0.1])
@pytest.mark.parametrize("patch_mask", [None, PATCH_MASK], ids=["all patches", "some patches"])
def test_gradients_are_those_of_finite_differences(patch_mask: Tensor | None, temperature: float | None) -> None:
    sentences, patches = inputs(torch.float64)
    whole = sentences.detach().nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, p: alignment_scores(s, MASK, p, 2, patch_mask, temperature), (whole, patches)
    )


@pytest.mark.parametrize("patch_mask", [None, PATCH_MASK], ids=["all patches", "some patches"])
def test_towards_temperature_0_the_softmax_is_the_maximum(patch_mask: Tensor | None) -> None:
    sentences, patches = inputs(torch.float64)
    soft = alignment_scores(sentences, MASK, patches, 2, patch_mask, 1e-5)
    hard = alignment_scores(sentences, MASK, patches, 2, patch_mask)
    for mine, theirs in zip(soft, hard, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    gradients = (differentiated(*scores, sentences, patches) for scores in (soft, hard))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_each_score_alone_has_its_own_gradient(temperature: float | None) -> None:
    sentences, patches = inputs(torch.float64)
    for score in (0, 1):
        scores = alignment_scores(sentences, MASK, patches, 2, None, temperature)
        got = torch.autograd.grad(scores[score].sum(), (sentences, patches))
        wanted = torch.autograd.grad(
            loop(sentences, MASK, patches, None, temperature)[score].sum(), (sentences, patches)
        )
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_side_may_need_no_gradient(frozen: int) -> None:
    both, one = inputs(torch.float64), list(inputs(torch.float64))
    one[frozen] = one[frozen].detach()
    wanted = differentiated(*alignment_scores(both[0], MASK, both[1], 2), *both)[1 - frozen]
    (got,) = differentiated(*alignment_scores(one[0], MASK, one[1], 2), one[1 - frozen])
    assert torch.equal(got, wanted)


def test_of_equal_patches_and_sentences_one_takes_the_whole_gradient() -> None:
    sentences = F.normalize(torch.ones(1, 2, 3), dim=-1).requires_grad_()
    patches = F.normalize(torch.ones(1, 4, 3), dim=-1).requires_grad_()
    visual, textual = alignment_scores(sentences, torch.ones(1, 2, dtype=torch.bool), patches, 1)
    of_sentences, of_patches = torch.autograd.grad((visual + textual).sum(), (sentences, patches))
    for gradient in (of_sentences, of_patches):
        torch.testing.assert_close(gradient.sum((0, 1)), torch.full((3,), 2 / 3**0.5))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_autocast_does_not_round_the_cosines(temperature: float | None) -> None:
    sentences, patches = inputs(torch.float32)
    found = []
    for within in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            scores = alignment_scores(sentences, MASK, patches, 2, None, temperature)
        found.append([*scores, *differentiated(*scores, sentences, patches)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_what_is_not_finite_shows_in_the_scores(temperature: float | None) -> None:
    """The loop refuses a loss that is not finite: no pooling may hide it."""
    sentences, patches = inputs(torch.float32)
    broken = patches.detach().clone()
    broken[2, 5] = torch.nan
    visual, textual = alignment_scores(sentences, MASK, broken, 2, None, temperature)
    assert visual[:, 2].isnan().all()
    assert textual[:, 2].isnan().all()
    assert not visual[:, 3].isnan().any()


def test_a_text_without_sentences_and_an_empty_chunk_are_refused() -> None:
    sentences, patches = inputs(torch.float32)
    missing = MASK & (torch.arange(5) != 1)
    if local_alignment.countable(MASK):
        with pytest.raises(ValueError, match=r"^mask: text 3 has no sentence$"):
            alignment_scores(sentences, missing, patches, 2)
    else:
        visual, _ = alignment_scores(sentences, missing, patches, 2)
        assert visual[3].isnan().all()
        assert not visual[:3].isnan().any()
    with pytest.raises(ValueError, match=r"^chunk: 0 is less than 1 image$"):
        alignment_scores(sentences, MASK, patches, 0)


# Images that differ in their patches


def test_a_mask_without_padding_changes_nothing() -> None:
    sentences, patches = inputs(torch.float64)
    everywhere = torch.ones_like(PATCH_MASK)
    masked, plain = (alignment_scores(sentences, MASK, patches, 2, mask) for mask in (everywhere, None))
    for mine, theirs in zip(masked, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=0)
    gradients = (differentiated(*scores, sentences, patches) for scores in (masked, plain))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-14, rtol=0)


def test_of_equal_patches_of_an_image_one_takes_the_whole_gradient() -> None:
    sentences = F.normalize(torch.ones(1, 2, 3), dim=-1).requires_grad_()
    patches = F.normalize(torch.ones(2, 4, 3), dim=-1).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    visual, textual = alignment_scores(sentences, torch.ones(1, 2, dtype=torch.bool), patches, 2, mask)
    of_sentences, of_patches = torch.autograd.grad((visual + textual).sum(), (sentences, patches))
    torch.testing.assert_close(of_sentences.sum((0, 1)), torch.full((3,), 4 / 3**0.5))
    torch.testing.assert_close(of_patches.sum(1), torch.full((2, 3), 2 / 3**0.5))
    assert not of_patches[~mask].any()


@pytest.mark.parametrize("temperature", [None, 0.1, 2.0])
def test_an_image_without_patches_is_refused(temperature: float | None) -> None:
    sentences, patches = inputs(torch.float32)
    missing = PATCH_MASK & (torch.arange(IMAGES) != 2)[:, None]
    if local_alignment.countable(MASK):
        with pytest.raises(ValueError, match=r"^patch_mask: image 2 has no patch$"):
            alignment_scores(sentences, MASK, patches, 2, missing, temperature)
    else:
        for scores in alignment_scores(sentences, MASK, patches, 2, missing, temperature):
            assert not scores[:, 2].isfinite().any()
            assert scores[:, 3].isfinite().all()
